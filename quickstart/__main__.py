"""Make data and a small mixture of experts, train it (SFT, then PSFT) on two processes, export, draw, sample.

Every step is one command; it is printed before it runs, and can be run by hand just so.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from megapsft.config import load_config

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.yaml"
MADE = ("train.jsonl", "heldout.jsonl", "model", "run", "export", "curves.png", "curves-step.png")  # below the output folder
WIDTH = "120"  # of tables in a log; a terminal knows its own


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="output folder; default: runs/quickstart. What an earlier one left is removed")
    parser.add_argument("--steps", type=int, help="steps of each phase, for a quick look; default: those of " + CONFIG)
    options = parser.parse_args(arguments)
    os.chdir(ROOT)  # printed paths are relative to it
    config = load_config(CONFIG)
    out = options.out or Path(config.run.dir).parent
    overrides = []
    if options.out:
        overrides += [f"run.dir={out / 'run'}", f"model.path={out / 'model'}", f"data.path={out / 'train.jsonl'}"]
    if options.steps:
        overrides += [f"train.sft_warmup_steps={options.steps}", f"train.steps={options.steps}"]

    start = time.monotonic()
    clear(out)
    train, heldout, model, run, export, curves, _ = (str(out / name) for name in MADE)
    steps = (
        ("megapsft", "make-data", "--out", train, "--count", "8000"),
        ("megapsft", "make-data", "--out", heldout, "--count", "20", "--seed", "1"),
        ("megapsft", "init-model", "--family", "qwen3_moe", "--data", train, "--vocab-size", "1024", "--out", model),
        ("megapsft", "train", CONFIG, *overrides, "--nproc-per-node", "2"),
        ("megapsft", "export", run, "--out", export),
        ("python", "-m", "quickstart.sample", export, heldout, "--unlike", train),
        ("megapsft", "curves", run, "--out", curves),  # and the table of both phases
    )
    for command in steps:
        if not carry_out(command):
            return 1
    report(out, time.monotonic() - start)
    return 0


def clear(out: Path) -> None:
    """Remove what an earlier quickstart made, and nothing else."""
    for path in (out / name for name in MADE):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def carry_out(command: tuple[str, ...]) -> bool:
    """Print the command and run it, with the interpreter that runs this."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    module = {"megapsft": (sys.executable, "-m", "megapsft.cli"), "python": (sys.executable,)}[command[0]]
    environment = os.environ if sys.stdout.isatty() else {"COLUMNS": WIDTH} | os.environ
    code = subprocess.run([*module, *command[1:]], env=environment, check=False).returncode
    if code:
        print(f"quickstart: the command above failed (exit code {code})", file=sys.stderr)
    return code == 0


def report(out: Path, seconds: float) -> None:
    print(f"\nmodel, for transformers  {out / 'export'}")
    print(f"curves                   {out / 'curves.png'}")
    print(f"where a step goes        {out / 'curves-step.png'}")
    print(f"tensorboard --logdir     {out / 'run' / 'tensorboard'}")
    print(f"quickstart: done in {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
