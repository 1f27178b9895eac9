"""python -m tests.py312 [FOLDER ...]: the suite with this interpreter's Python and Megatron-Core, into docs/results/py312.json.

Folder by folder, each recorded when it ends: after an interruption only what is missing runs, and what failed; everything once
a tracked file has changed. What starts SGLang's servers or needs the cluster comes last and together, as in `make test`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megapsft.output.whole import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs/results/py312.json"
MARKERS = "not servers and not slurm"
SERVERS = "servers-and-cluster"  # the part that they leave out, of all folders
NOTHING_SELECTED = 5  # exit status of pytest
PACKAGES = ("transformers", "numpy", "triton")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.py312", description=__doc__)
    parser.add_argument("folders", nargs="*", type=part_of, metavar="FOLDER", help="all, or some of " + ", ".join(parts()))
    parser.add_argument("--workers", type=int, default=2, help="files of tests side by side (2)")
    options = parser.parse_args(arguments)
    versions, failed = installed(), False
    for part in options.folders or parts():
        source, record = digest(), recorded(versions).get(part)
        if record is None or record["failed"] or record["source"] != source:
            record = run(part, options.workers, source)
            write(versions, part, record)
        failed = failed or bool(record["failed"])
        verdict = f"{record['passed']:5} passed, {len(record['failed'])} failed"
        print(f"megatron-core {versions['megatron-core']}  {part:24}{verdict}", flush=True)
    return int(failed)


def parts() -> list[str]:
    """Folders of tests/ with tests in them, then its files, then what needs servers or a cluster."""
    tests = ROOT / "tests"
    folders = sorted(path.name for path in tests.iterdir() if path.is_dir() and any(path.rglob("test_*.py")))
    return [*folders, *sorted(path.name for path in tests.glob("test_*.py")), SERVERS]


def part_of(name: str) -> str:
    """A name of the command line, one of `parts`. Not argparse's choices: of no names it looks for the empty list among them."""
    if name not in parts():
        raise argparse.ArgumentTypeError(f"{name} is no part: choose from {', '.join(parts())}")
    return name


def run(part: str, workers: int, source: str) -> dict[str, Any]:
    """Run one part; its record.

    Raises:
        RuntimeError: pytest did not get as far as its report.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, start = Path(folder) / "report.xml", time.monotonic()
        done = subprocess.run(
            [*command(part, workers), f"--junitxml={report}"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        if done.returncode not in (0, 1, NOTHING_SELECTED) or not report.is_file():
            raise RuntimeError(f"pytest of {part} ended with {done.returncode}")
        passed, failed = count(report)
        return {
            "date": datetime.date.today().isoformat(),
            "source": source,
            "passed": passed,
            "failed": failed,
            "seconds": round(time.monotonic() - start),
        }


def command(part: str, workers: int) -> list[str]:
    """What runs a part."""
    pytest = [sys.executable, "-m", "pytest"]
    if part == SERVERS:
        root = [] if os.getuid() == 0 else ["sudo"]
        cluster = [*root, sys.executable, "-m", "tests.slurm.cluster", "run", "--clusters", "3"]
        return [*cluster, *pytest, "-n", "3", "--dist", "loadgroup", "--no-loadscope-reorder", "-m", "servers or slurm"]
    side_by_side = ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
    return [*pytest, f"tests/{part}", "-m", MARKERS, *side_by_side]


def count(report: Path) -> tuple[int, list[str]]:
    """Tests that passed, and the names of those that did not, skipped ones among them: there are to be none."""
    passed, failed = 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        if len(case.findall("failure") + case.findall("error") + case.findall("skipped")):
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            passed += 1
    return passed, sorted(set(failed))


def digest() -> str:
    """The first digits of a SHA-256 of all files of the repository but the result itself, by path and content."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path != RESULT and path.is_file()):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def installed() -> dict[str, str]:
    """What identifies an environment: package -> version."""
    ours = {"megatron-core": version("megatron-core"), "python": platform.python_version(), "torch": torch.__version__}
    return ours | {package: version(package) for package in PACKAGES}


def results() -> list[dict[str, Any]]:
    return json.loads(RESULT.read_text())["environments"] if RESULT.is_file() else []


def recorded(versions: dict[str, str]) -> dict[str, Any]:
    """part -> record of the environment with these versions."""
    return next((one["parts"] for one in results() if one["versions"] == versions), {})


def write(versions: dict[str, str], part: str, record: dict[str, Any]) -> None:
    """Put a record in its place; of each version of Megatron-Core one environment is kept."""
    found = recorded(versions) | {part: record}
    ordered = {name: found[name] for name in parts() if name in found}
    others = [one for one in results() if one["versions"]["megatron-core"] != versions["megatron-core"]]
    environments = sorted([*others, {"versions": versions, "parts": ordered}], key=lambda one: one["versions"]["megatron-core"])
    about = {"command": "make test-py312", "environments": environments}
    write_whole(RESULT, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
