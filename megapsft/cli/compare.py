"""megapsft compare: where models differ, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from megapsft.cli.overrides import OVERRIDES
from megapsft.cli.world import is_first, world_of
from megapsft.errors import Refused

if TYPE_CHECKING:
    from megapsft.train.compare import ComparisonPlan


def compare(
    *,
    base: Path,
    data: Path,
    tuned: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    reference: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    rows: int = 128,
    out: Path | None = None,
    json: Path | None = None,
    nproc_per_node: int | None = None,
) -> int:
    """Show where models differ on the same responses, token by token.

    For example:
        megapsft compare --base models/tiny --tuned exports/psft --data train.jsonl --out compare.html
        megapsft compare --base models/tiny --tuned exports/psft --tuned exports/sft --data test.jsonl --json compare.json
        megapsft compare --base models/tiny --tuned runs/psft/checkpoints/latest --reference r1=models/r1 --data test.jsonl

    Responses are tokenised and masked as `megapsft train` does it, with the tokenizer and chat template of the base; `data.`,
    `model.`, `fp8.` and `parallel.` keys and train.temperature are read as there (docs/compare.md).

    Args:
        base: Hugging Face folder.
        tuned: the same, or RUN/checkpoints/step-*, or NAME=DIR; once for each model. Those of a name are a path, in their order.
        data: .jsonl or .parquet file of prompts with responses, of any data.kind that has some.
        reference: NAME=DIR; once for each model that the others are placed by, beside the base.
        rows: the first of the data.
        out: page of HTML to write.
        json: JSON to write; as RUN/compare.json the report of the run shows it.
        nproc_per_node: processes to start here; default: the GPUs of this machine, or the fewest that the split needs.
    """
    from megapsft.output.places import check_file
    from megapsft.platform.launch import become_world_of_one, torchrun
    from megapsft.train.compare import config_of, plan_comparison

    if not tuned:
        raise Refused("compare", "has nothing to lay beside the base", "name a model: --tuned DIR")
    check_file("--out", out)
    check_file("--json", json)
    config = config_of(base, data, rows, OVERRIDES)
    world, joined = world_of(config.parallel, nproc_per_node)
    models = [_named(text) for text in tuned], [_named(text) for text in reference]
    for name, path in models[1]:
        if name is None:
            raise Refused(f"--reference {path}", "has no name", f"write --reference NAME={path}")
    plan = plan_comparison(config, world, *models)
    if world > 1 and not joined:
        several = [("--base", base), *(("--tuned", text) for text in tuned), *(("--reference", text) for text in reference)]
        options = [*several, ("--data", data), ("--rows", rows), ("--out", out), ("--json", json)]
        given = [text for name, value in options if value is not None for text in (name, str(value))]
        return torchrun(world, ["compare", *OVERRIDES, *given])
    if not joined:
        become_world_of_one()
    return _compare_here(plan, out, json)


def _named(text: str) -> tuple[str | None, Path]:
    """NAME=DIR, or DIR alone."""
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and name and "/" not in name else (None, Path(text))


def _compare_here(plan: ComparisonPlan, out: Path | None, json: Path | None) -> int:
    """As one rank of the world that the environment describes; the first one reports."""
    from rich.console import Console
    from rich.progress import Progress

    from megapsft import parallel
    from megapsft.platform.compat import hush
    from megapsft.report.compare import show_comparison, write_json, write_page
    from megapsft.train.compare import compare_models

    hush()
    parallel.initialize(plan.run.mesh, plan.run.config.parallel, plan.run.config.train.seed)
    with Progress(console=Console(stderr=True), disable=not is_first()) as progress:
        task = progress.add_task("", total=plan.minibatches)
        comparison = compare_models(plan, lambda name: progress.update(task, advance=1, description=name))
    if is_first():
        show_comparison(comparison)
        for path, wrote in ((json, write_json), (out, write_page)):
            if path is not None:
                wrote(comparison, path)
                print(f"wrote {path}")
    parallel.shutdown()
    return 0
