"""RL of a tiny model on generated problems, from a PSFT warm start: accuracy over steps, with both engines, and with the
rewards of other responses as the control.

    python benchmarks/rl.py --work runs/rl --json docs/results/rl.json --plot docs/results/rl.png

Every run is a shipped config and `megapsft train`; one that is there already is continued, and only then read. Accuracy is that
of one response at temperature 1 to each of 200 problems that are in no training file.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.metrics.records import read_records
from megapsft.report.evaluations import evaluation_chart
from megapsft.report.stored import write_measurement

ROOT = Path(__file__).resolve().parents[1]
START = 0.44  # of 500 problems right, then RL begins: less than half also by the 200 that it is measured by
SIZES = ["train.steps=240", "train.batch_size=24", "train.minibatch_size=12"]
INFORMATIVE = "rollout.dynamic_sampling="  # a third of the groups would be all right or all wrong: time without a gradient
RUNS = {  # label -> overrides of configs/grpo/tiny-qwen3-arithmetic.yaml
    # sampled on one core, trained on the other
    "SGLang, a step ahead": ["rollout.engine=sglang", "rollout.max_weight_lag=1", INFORMATIVE + "math_answer"],
    "in process": [INFORMATIVE + "math_answer"],
    "shuffled rewards (control)": [
        f"rewards=[{{name: {ROOT / 'benchmarks/shuffled_reward.py'}, label: shuffled}}]",
        INFORMATIVE + "shuffled",
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/rl"), help="models and runs go here (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw accuracy over steps into this PNG; needs --json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config of every RL run")
    options = parser.parse_args()
    if options.plot and not options.json:
        parser.error("--plot needs --json, of which it is the picture")
    data, test, validation = make_data(options.work)
    model = warm_start(options.work, data, validation)
    sglang, *in_process = RUNS
    train_run(sglang, options.work, model, data, test, options.overrides)
    with ThreadPoolExecutor() as side_by_side:  # a core for each
        list(side_by_side.map(lambda label: train_run(label, options.work, model, data, test, options.overrides), in_process))
    figures = {label: read(folder(label, options.work)) for label in RUNS}
    result = {
        "benchmark": "rl",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "architecture": platform.machine()},
        "runs": figures,
    }
    if options.json:
        shown = evaluation_chart({label: points(one) for label, one in figures.items()}, "Accuracy (share of problems)")
        write_measurement(result, [shown], options.json, options.plot)
    Console(width=120).print(table(figures))
    return 0


def make_data(work: Path) -> tuple[Path, Path, Path]:
    """Problems to train on, others to be measured by, and others that say when the warm start has had enough."""
    files = tuple(work / f"{name}.jsonl" for name in ("train", "test", "validation"))
    if not files[-1].is_file():
        rows = generate(8700, 1, "easy")
        for file, part in zip(files, (rows[:8000], rows[8000:8200], rows[8200:]), strict=True):
            write_jsonl(file, part)
    return files


def warm_start(work: Path, data: Path, validation: Path) -> Path:
    """A model in the midst of PSFT, right in less than half of the cases; after how many steps depends on rounding."""
    tiny, run, out = work / "tiny", work / "psft", work / "warm"
    if not tiny.exists():
        sizes = ["--vocab-size=320", "--hidden-size=128", "--num-layers=3", "--head-dim=32", "--intermediate-size=384"]
        _megapsft("init-model", "--family", "qwen3", "--data", str(data), *sizes, "--out", str(tiny))
    if not out.exists():
        where = [f"model.path={tiny}", f"data.path={data}", f"run.dir={run}", f"evaluate.data=[{validation}]"]
        often = ["checkpoint.interval=5", "checkpoint.keep_last=100", "evaluate.interval=5"]
        sampled = ["evaluate.temperature=1", "evaluate.top_p=1", "evaluate.max_tokens=24"]
        config = str(ROOT / "configs/psft/tiny-qwen3-arithmetic.yaml")
        _megapsft("train", config, *where, *often, *sampled, "train.sft_warmup_steps=120", "train.steps=80")
        found = read_records(run / "evaluations.jsonl")
        start = last_below(START, [(one["step"], one["evaluate/validation/avg"]) for one in found])
        _megapsft("export", str(run), "--checkpoint", f"step-{start:08d}", "--out", str(out))
    return out


def last_below(limit: float, accuracy: Sequence[tuple[int, float]]) -> int:
    """The last step before the first whose accuracy is not below the limit."""
    reached = next((number for number, (_, value) in enumerate(accuracy) if value >= limit), len(accuracy))
    return accuracy[reached - 1][0]


def folder(label: str, work: Path) -> Path:
    return work / label.partition(",")[0].partition(" (")[0].replace(" ", "-").lower()


def train_run(label: str, work: Path, model: Path, data: Path, test: Path, more: Sequence[str]) -> None:
    """One of RUNS, and beside its folder the seconds of the command that did it."""
    run, overrides = folder(label, work), RUNS[label]
    if "rollout.engine=sglang" not in overrides:
        overrides = [*overrides, "rollout.max_batch_size=256"]
    where = [f"model.path={model}", f"data.path={data}", f"run.dir={run}", f"evaluate.data=[{test}]"]
    began, spent = time.perf_counter(), run.with_suffix(".seconds")
    _megapsft("train", str(ROOT / "configs/grpo/tiny-qwen3-arithmetic.yaml"), *where, *SIZES, *overrides, *more)
    if not spent.exists():  # not of a command that found it done
        spent.write_text(f"{time.perf_counter() - began}\n")


def read(run: Path) -> dict:
    steps, found = read_records(run / "steps.jsonl"), read_records(run / "evaluations.jsonl")
    whole = sum(step["perf/seconds"] for step in steps)
    return {
        "seconds_of_command": float(run.with_suffix(".seconds").read_text()),
        "accuracy": [
            {"step": one["step"], "avg": one["evaluate/test/avg"], "standard_error": one["evaluate/test/avg_se"]} for one in found
        ],
        "reward": [step["reward/mean"] for step in steps],
        "entropy": [step["policy/entropy"] for step in steps],
        "seconds": whole,
        "share_of_rollouts": sum(step["perf/rollout_wait_seconds"] for step in steps) / whole,
        "share_of_weight_updates": sum(step["perf/weight_update_seconds"] for step in steps) / whole,
        "mismatch_max": max(step["rollout/mismatch_max"] for step in steps),
    }


def points(figures: dict) -> list[tuple[float, float, float]]:
    """(step, accuracy, standard error)."""
    return [(one["step"], one["avg"], one["standard_error"]) for one in figures["accuracy"]]


def table(figures: dict[str, dict]) -> Table:
    shown = Table(title="accuracy on 200 problems, one response each at temperature 1")
    for heading in ("run", "before", "after", "steps", "minutes", "of steps: sampling", "weight updates", "largest mismatch"):
        shown.add_column(heading)
    for label, one in figures.items():
        first, last = ("{avg:.3f} ± {standard_error:.3f}".format(**point) for point in (one["accuracy"][0], one["accuracy"][-1]))
        shares = (f"{one[key]:.0%}" for key in ("share_of_rollouts", "share_of_weight_updates"))
        minutes = f"{one['seconds_of_command'] / 60:.1f}"  # of the command, with starting and benchmarks
        shown.add_row(label, first, last, str(len(one["reward"])), minutes, *shares, f"{one['mismatch_max']:.1e}")
    return shown


def _megapsft(*arguments: str) -> None:
    print("megapsft " + " ".join(arguments), flush=True)
    one_thread = {"OMP_NUM_THREADS": "1"}  # trainer and server share the cores: threads that wait for each other lose more
    subprocess.run([sys.executable, "-m", "megapsft.cli", *arguments], check=True, env=one_thread | os.environ)


if __name__ == "__main__":
    sys.exit(main())
