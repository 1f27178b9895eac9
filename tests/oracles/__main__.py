"""Evaluate a file of vectors: `python -m tests.oracles FILE [--objective NAME]`. The verdict is the last line."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megapsft.errors import Refused
from tests.oracles.aggregation import evaluate_aggregation
from tests.oracles.compare import TOLERANCE, deviations
from tests.oracles.mixtures import evaluate_luffy, evaluate_rft_raft, evaluate_srft
from tests.oracles.offline import evaluate_dft, evaluate_dpo, evaluate_gem, evaluate_iw_sft, evaluate_sft_kl
from tests.oracles.per_token import evaluate_psft, evaluate_sft
from tests.oracles.rollouts import (
    evaluate_cispo,
    evaluate_dapo,
    evaluate_dr_grpo,
    evaluate_grpo,
    evaluate_gspo,
    evaluate_ppo,
    evaluate_tis,
)

# objective -> what computes the outputs of one of its cases
EVALUATORS: dict[str, Callable[[dict[str, Any], torch.dtype], dict[str, Any]]] = {
    "aggregation": evaluate_aggregation,
    "cispo": evaluate_cispo,
    "dapo": evaluate_dapo,
    "dft": evaluate_dft,
    "dpo": evaluate_dpo,
    "dr_grpo": evaluate_dr_grpo,
    "gem": evaluate_gem,
    "grpo": evaluate_grpo,
    "gspo": evaluate_gspo,
    "iw_sft": evaluate_iw_sft,
    "luffy": evaluate_luffy,
    "ppo": evaluate_ppo,
    "psft": evaluate_psft,
    "rft_raft": evaluate_rft_raft,
    "sft": evaluate_sft,
    "sft_kl": evaluate_sft_kl,
    "srft": evaluate_srft,
    "tis": evaluate_tis,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row a case and the verdict. 0 where every case lies within the tolerances, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracles", description=__doc__)
    parser.add_argument("file", type=Path, help="vectors: {cases: [{objective, name, inputs, hparams, outputs}]}")
    parser.add_argument("--objective", help=f"only this one; known: {', '.join(sorted(EVALUATORS))}")
    options = parser.parse_args(arguments)
    try:
        cases = load(options.file, options.objective)
    except Refused as error:
        print(f"FAIL {error}")
        return 1

    unsupported = Counter(case["objective"] for case in cases if case["objective"] not in EVALUATORS)
    cases = [case for case in cases if case["objective"] in EVALUATORS]
    width = max((len(label(case)) for case in cases), default=0)
    passed, largest = 0, {dtype: (0.0, "") for dtype in TOLERANCE}
    for case in cases:
        columns, good = [], True
        for dtype, tolerance in TOLERANCE.items():
            deviation, where = worst(case, dtype)
            good = good and deviation <= tolerance
            columns.append(f"{name(dtype)} {deviation:.1e} {where:28}")
            largest[dtype] = max(largest[dtype], (deviation, f"{label(case)} {where}"))
        passed += good
        print(f"{'ok  ' if good else 'FAIL'} {label(case):{width}}  " + "  ".join(columns).rstrip())
    if unsupported:
        print(f"not yet supported: {', '.join(sorted(unsupported))} ({unsupported.total()} cases)")
    summary = "; ".join(f"{name(dtype)} {deviation:.1e} at {where}" for dtype, (deviation, where) in largest.items())
    if not cases:
        print(f"FAIL no case of {options.objective or 'a supported objective'} in {options.file}")
        return 1
    verdict = "PASS" if passed == len(cases) else "FAIL"
    print(f"{verdict} {passed} of {len(cases)} cases, largest deviation {summary}")
    return 0 if passed == len(cases) else 1


def load(path: Path, objective: str | None) -> list[dict[str, Any]]:
    """The cases of a file, of one objective or of all.

    Raises:
        Refused: no such file, not of the format, or an objective that cannot be evaluated.
    """
    if objective is not None and objective not in EVALUATORS:
        raise Refused(f"--objective {objective}", "is not known", "known: " + ", ".join(sorted(EVALUATORS)))
    try:
        return [case for case in json.loads(path.read_text())["cases"] if objective in (None, case["objective"])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(str(path), f"is not a file of vectors ({error!r})", 'write {"cases": [...]}') from None


def worst(case: dict[str, Any], dtype: torch.dtype) -> tuple[float, str]:
    """The largest deviation of a case and what deviates; infinite where it cannot be evaluated."""
    try:
        return max(deviations(case["outputs"], EVALUATORS[case["objective"]](case, dtype), dtype))
    except Exception as error:  # one malformed case must not hide the verdict on the others
        return float("inf"), " ".join(f"{type(error).__name__}: {error}".split())[:120]


def label(case: dict[str, Any]) -> str:
    return f"{case['objective']}/{case.get('name', '?')}"


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
