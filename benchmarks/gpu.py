"""What a GPU gives: the ceiling of matrix products, the head, and steps of SFT and PSFT beside those of `transformers`.

    python benchmarks/gpu.py                                  # about 8 minutes on one H200; docs/results/gpu.json and gpu.md
    python benchmarks/gpu.py --only ceiling,head --minutes 2
    python benchmarks/gpu.py --keep                           # go on where an earlier run of today ran out of time
    python benchmarks/gpu.py --device cpu --tiny              # every part at a size that says nothing, in seconds: for CI
    python benchmarks/gpu.py --report                         # write the page again from the JSON

In one run, on one GPU, most important first; what fails is recorded with its error, what there was no time for as not reached:

    ceiling     matrix products by the library that torch calls, in bf16 and FP8, at 8192^3 and at the shapes of the head
    head        forward, and forward and backward: ours (Triton, torch) and plain logits with cross entropy, and their memory
    SLICE-bf16  updates of SFT, and a step of PSFT: `megapsft.train.update` on a Policy, as `megapsft train` does it
    SLICE-peer  updates of the same slice, tokens and rows by `transformers`: SDPA, fused AdamW over bf16 parameters
    SLICE-fp8-RECIPE  as SLICE-bf16, linear layers in FP8

Slices have the width of real models and fewer layers: dense of Qwen3-8B (8), moe of Qwen3-30B-A3B (4; experts balanced by force).
Samples fill packs of 4k and of 32k positions. Weights and tokens are random. Each group of parts has a process of its own, and so
memory and errors of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_parts.figures import figures
from gpu_parts.lines import FAILED, MEASURED, NEEDS, NOT_REACHED, in_short, status_of
from gpu_parts.report import write
from gpu_parts.sizes import RECIPES

RESULT, RESULT_OF_TINY = Path("docs/results/gpu.json"), Path("runs/gpu-tiny.json")
SLICES = ("dense", "moe")
FIRST = (("ceiling", "head"), *((f"{name}-{kind}",) for name in SLICES for kind in ("bf16", "peer")))
GROUPS = FIRST + tuple((f"{name}-fp8-{recipe}",) for recipe in RECIPES for name in SLICES)
PARTS = tuple(part for group in GROUPS for part in group)
LEAST_SECONDS = 25.0  # for a group: less is not enough to import, build and measure anything
GRACE_SECONDS = 10.0  # that a line may take longer than the time there was


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        return measure(options.child.split(","), options.json, options.device, options.tiny, options.seconds)
    if not options.report:
        run(options)
    for file in write(options.json):
        print(f"wrote {file}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help=f"what is written (default: {RESULT}; with --tiny {RESULT_OF_TINY})")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: %(default)s)")
    parser.add_argument("--only", metavar="PART,PART", help="measure these, anew where they are kept: " + ", ".join(PARTS))
    parser.add_argument("--keep", action="store_true", help="keep what the JSON has of the same machine, versions and date")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--tiny", action="store_true", help="sizes that show only that everything runs; a CPU takes no other")
    parser.add_argument("--report", action="store_true", help="measure nothing: write the page from the JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.json = options.json or (RESULT_OF_TINY if options.tiny else RESULT)
    unknown = set(options.only.split(",") if options.only else ()) - set(PARTS)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}: use some of {', '.join(PARTS)}")
    if not (options.report or options.child):
        options.device = options.device or ("cuda" if has_cuda() else "cpu")
        if options.device == "cuda" and not has_cuda():
            parser.error("--device cuda: torch sees no GPU; use --device cpu --tiny")
        if options.device == "cpu" and not options.tiny:
            parser.error("on a CPU this measures nothing worth knowing: add --tiny, which shows that every part runs")
    return options


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run(options: argparse.Namespace) -> None:
    """Measure every part that is asked for; the JSON is written after each group, whatever becomes of this process then."""
    from gpu_parts.machine import machine

    deadline = time.monotonic() + 60 * options.minutes
    wanted = options.only.split(",") if options.only else PARTS
    result = {
        "benchmark": "gpu",
        "date": datetime.now(UTC).date().isoformat(),
        "tiny": options.tiny,
        "minutes": options.minutes,
        "machine": machine(options.device),
        "parts": {},
    }
    before = kept(options.json, result) if options.keep else {}
    if options.only:
        before = {part: found for part, found in before.items() if part not in wanted}
    needs = {part: found for part in wanted if (found := unmet(part, result["machine"]))}
    todo = [[part for part in group if part in wanted and part not in before | needs] for group in GROUPS]
    todo = [group for group in todo if group]
    if options.device == "cpu" and todo:
        todo = [[part for group in todo for part in group]]  # imports take longer than all of it
    late = {part: {"status": NOT_REACHED, "lines": {}} for group in todo for part in group}
    found = late | needs | before
    result["parts"] = {part: found[part] for part in PARTS if part in found}
    for group in todo:
        left = deadline - time.monotonic()
        if left > LEAST_SECONDS:
            print(f"{', '.join(group)}: {left:.0f} s left", flush=True)
            result["parts"] |= in_a_process(group, options, left, result["date"])
            save(result, options.json)
    save(result, options.json)


def save(result: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result | {"figures": figures(result)}, indent=1) + "\n")


def kept(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What `file` has measured whole, if it is of the same machine, versions and day."""
    if not file.exists():
        return {}
    from gpu_parts.machine import alike

    before = json.loads(file.read_text())
    if not alike(before["machine"], result["machine"]):
        print(f"nothing is kept: {file} is of {before['machine']}, and this is {result['machine']}")
        return {}
    for key in ("tiny", "date"):
        if before[key] != result[key]:
            print(f"nothing is kept: {key} of {file} is {before[key]}, and now {result[key]}")
            return {}
    return {part: found for part, found in before["parts"].items() if found["status"] == MEASURED}


def unmet(part: str, machine: dict[str, Any]) -> dict[str, Any] | None:
    """A part that cannot be measured on this machine, and what it needs."""
    error = None
    if "-fp8-" in part and not (machine["gpu"] and machine["transformer-engine"]):
        error = "needs CUDA and Transformer Engine"
    elif part.endswith("mxfp8") and machine["capability"] < [10, 0]:
        error = "needs a GPU of compute capability 10.0 or higher"
    return {"status": NEEDS, "error": error, "lines": {}} if error else None


def in_a_process(group: list[str], options: argparse.Namespace, seconds: float, date: str) -> dict[str, Any]:
    """What the parts of a group measured in a process of their own, however it ended."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.json"
        command = [sys.executable, __file__, "--child", ",".join(group), "--json", str(file), "--device", options.device]
        command += ["--seconds", str(seconds), *(["--tiny"] if options.tiny else [])]
        begin, error = time.monotonic(), None
        with (Path(folder) / "log").open("w+") as log:
            try:
                code = subprocess.run(command, stdout=log, stderr=log, timeout=seconds + GRACE_SECONDS).returncode
            except subprocess.TimeoutExpired:
                code, error = None, f"killed after {seconds + GRACE_SECONDS:.0f} s"
            log.seek(0)
            said = log.read()
        if code:
            error = f"ended with {code}: {in_short(said[-400:])}"
            print(said[-4000:], file=sys.stderr)
        found = json.loads(file.read_text()) if file.exists() else {}
    parts, at = {}, list(found)[-1] if found else group[0]
    for part in group:
        lines = found.get(part, {}).get("lines", {})
        parts[part] = {"status": status_of(lines), "date": date, "facts": found.get(part, {}).get("facts", {}), "lines": lines}
        if error and part == at:
            parts[part]["status"] = "partly" if status_of(lines) == MEASURED else FAILED
            parts[part]["error"] = error
        elif not lines:
            parts[part]["status"] = NOT_REACHED
    parts[group[-1]]["seconds_of_group"] = time.monotonic() - begin
    return parts


def measure(parts: list[str], file: Path, kind: str, tiny: bool, seconds: float) -> int:
    """The child's work: the parts one after the other, each line kept as it comes."""
    deadline = time.monotonic() + seconds
    from gpu_parts import ceiling, head
    from gpu_parts.device import Device
    from gpu_parts.lines import Lines
    from gpu_parts.sizes import REAL, TINY

    import megapsft  # noqa: F401  before megatron

    device = Device(kind)
    for part in parts:
        lines = Lines(file, part, deadline, device.free)
        lines.keep()  # before anything can end this process
        if part in ("ceiling", "head"):
            module = {"ceiling": ceiling, "head": head}[part]
        elif part.endswith("-peer"):
            from gpu_parts import peer as module
        else:
            from gpu_parts import ours as module
        module.measure(lines, TINY if tiny else REAL, device, part)
        lines.keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
