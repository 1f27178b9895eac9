"""SFT, and PSFT after an SFT warm-up, on GSM8K's training problems: tiny Qwen3 and Qwen3-MoE, tensor and pipeline split.

    python benchmarks/gsm8k.py --data gsm8k-train.jsonl --work runs/gsm8k --json docs/results/gsm8k.json

Every run is the shipped config and `megapsft train`; a run that is there already is continued, and only then tabled. Without
GSM8K, generated problems do: `megapsft make-data --out train.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from megapsft.metrics.records import read_records

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {"qwen3": "tiny-qwen3-gsm8k.yaml", "qwen3_moe": "tiny-qwen3-moe-gsm8k.yaml"}
SPLITS = {"tp2": "parallel.tensor_model_parallel_size=2", "pp2": "parallel.pipeline_model_parallel_size=2"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with the columns question and answer")
    parser.add_argument("--work", type=Path, default=Path("runs/gsm8k"), help="models and runs go here (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--vocab-size", type=int, default=1024, help="of its tokenizer (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config of every run")
    options = parser.parse_args()
    rows = []
    for family, config in FAMILIES.items():
        model = options.work / family
        if not model.exists():
            _megapsft(
                "init-model", "--family", family, "--data", str(options.data), "--vocab-size", str(options.vocab_size),
                "--out", str(model),
            )  # fmt: skip
        for objective in ("sft", "psft"):
            for split, override in SPLITS.items():
                run = options.work / f"{family}-{objective}-{split}"
                path = str(ROOT / "configs" / objective / config)
                where = [f"data.path={options.data}", f"model.path={model}", f"run.dir={run}"]
                _megapsft("train", path, *where, override, *options.overrides)
                rows.append(figures(family, objective, split, run, options.vocab_size))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"vocabulary": options.vocab_size, "runs": rows}, indent=1) + "\n")
    Console(width=120).print(table(rows))
    return 0


def figures(family: str, objective: str, split: str, run: Path, vocab_size: int) -> dict:
    """What the run's metrics.jsonl says: by phase, means over the first and last eight updates (one step)."""
    records, phases = read_records(run / "metrics.jsonl"), {}
    for phase in dict.fromkeys(record["phase"] for record in records):
        of = [record for record in records if record["phase"] == phase]
        phases[phase] = {
            "updates": len(of),
            "first_nll": of[0]["objective/nll"],
            "nll": [fmean(r["objective/nll"] for r in part) for part in (of[:8], of[-8:])],
            "entropy": [fmean(r["policy/entropy"] for r in part) for part in (of[:8], of[-8:])],
            "loss": [fmean(r["train/loss"] for r in part) for part in (of[:8], of[-8:])],
            "clip_fraction": fmean(r["objective/clip_fraction"] for r in of),
            "ratio_max": max(r["objective/ratio_max"] for r in of),
        }
    tokens = sum(record["data/real_tokens"] for record in records)
    return {
        "family": family,
        "objective": objective,
        "split": split,
        "log_vocabulary": math.log(vocab_size),
        "skipped_updates": records[-1]["train/skipped_updates"],
        "tokens_per_second": tokens / sum(record["perf/seconds"] for record in records),
        "phases": phases,
    }


def table(rows: list[dict]) -> Table:
    shown = Table(title="first and last: means over a step (8 updates)")
    for heading in ("model", "split", "phase", "updates", "nll", "entropy", "clip fraction", "skipped"):
        shown.add_column(heading)
    for row in rows:
        for phase, values in row["phases"].items():
            name = "sft (warm-up)" if phase == "warmup" else row["objective"]
            nll, entropy = ("{:.3f} → {:.3f}".format(*values[key]) for key in ("nll", "entropy"))
            clipped = f"{values['clip_fraction']:.3f}"
            skipped = str(row["skipped_updates"])
            shown.add_row(row["family"], row["split"], name, str(values["updates"]), nll, entropy, clipped, skipped)
    return shown


def _megapsft(*arguments: str) -> None:
    print("megapsft " + " ".join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "megapsft.cli", *arguments], check=True, cwd=Path.cwd())


if __name__ == "__main__":
    sys.exit(main())
