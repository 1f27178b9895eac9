"""megapsft make-data: problems to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from megapsft.errors import Refused


def make_data(
    *,
    out: Path,
    kind: Literal["demonstrations", "preferences", "rollouts"] = "demonstrations",
    count: int | None = None,
    seed: int = 0,
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    rollouts_per_prompt: int | None = None,
    level: Literal["worded", "easy"] | None = None,
) -> int:
    """Write worded arithmetic problems with worked solutions, as JSONL: to be demonstrations, preferences or rollouts.

    For example:
        megapsft make-data --out train.jsonl --count 4000
        megapsft make-data --kind preferences --out pairs.jsonl
        megapsft make-data --kind rollouts --from gsm8k-train.jsonl --rollouts-per-prompt 8 --out rollouts.jsonl

    Args:
        out: the file to write.
        kind: what data.kind is then; demonstrations have the columns `question` and `answer`, the others those of the defaults.
        count: problems, no two alike; default: 2000, or all of the file.
        seed: the same seed gives the same file.
        from_: JSONL with the columns of GSM8K, whose problems are taken; default: problems are made up.
        rollouts_per_prompt: where kind=rollouts; default: 4.
        level: of problems that are made up; easy ones have one sum or difference, worded ones (the default) up to three steps.
    """
    from megapsft.data.arithmetic import generate, preferences, read_problems, rollouts, write_jsonl
    from megapsft.output.places import check_file

    check_file("--out", out)
    if kind != "rollouts" and rollouts_per_prompt is not None:
        raise Refused(f"--rollouts-per-prompt {rollouts_per_prompt}", f"is not read where --kind {kind}", "use --kind rollouts")
    if count is not None and count < 1:
        raise Refused(f"--count {count}", "must be 1 or more", "leave it out for as many as there are")
    if level is not None and from_ is not None:
        raise Refused(f"--level {level}", f"is not read where --from {from_}", "leave out one of the two")
    if from_ is None:
        problems = generate(2000 if count is None else count, seed, level or "worded")
    else:
        problems = read_problems(from_, count)
    rows = problems
    if kind == "preferences":
        rows = preferences(problems, seed)
    if kind == "rollouts":
        rows = rollouts(problems, seed, 4 if rollouts_per_prompt is None else rollouts_per_prompt)
    write_jsonl(out, rows)
    print(f"wrote {len(problems)} problems to {out}")
    return 0
