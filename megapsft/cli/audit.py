"""megapsft audit: what would be trained, before anything is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from megapsft.cli.overrides import OVERRIDES
from megapsft.cli.world import world_of
from megapsft.errors import Refused

if TYPE_CHECKING:
    from megapsft.audit.across import Problem
    from megapsft.config import Config
    from megapsft.data.chat_template import ChatTemplate

WARNED = 1  # the exit code where --strict is given and there are warnings


def audit(
    config: tyro.conf.Positional[Path],
    *,
    rows: int = 20,
    html: Path | None = None,
    json: Path | None = None,
    eval: tuple[Path, ...] = (),
    strict: bool = False,
) -> int:
    """Show which tokens a run would train, and what is wrong with its rows: megapsft audit CONFIG.yaml [key=value ...].

    For example:
        megapsft audit configs/psft/tiny-qwen3-gsm8k.yaml data.path=train.jsonl
        megapsft audit configs/dpo/tiny-qwen3-preferences.yaml --rows 5 --html audit.html
        megapsft audit configs/psft/tiny-qwen3-gsm8k.yaml --eval gsm8k-test.jsonl math500.jsonl --strict

    All rows are read and every rule is applied to each; nothing is trained. docs/audit.md lists the rules.

    Args:
        config: YAML file; `key=value` arguments overlay it, `megapsft config` lists the keys.
        rows: rows to show, half of them with warnings where there are any.
        html: one self-contained page to write.
        json: all counts, and for each warning its rows, to write.
        eval: files of problems, beside those of evaluate.data, that should not be among the prompts.
        strict: exit with 1 where there is a warning.
    """
    from megapsft.audit.audit import audit as look
    from megapsft.checkpoint.hf import read_config
    from megapsft.config import load_config
    from megapsft.data.chat_template import ChatTemplate
    from megapsft.output.places import check_file
    from megapsft.parallel import plan_mesh
    from megapsft.platform.cpu import has_cuda
    from megapsft.policy.build import model_shape
    from megapsft.report.audit import show_audit, write_audit
    from megapsft.report.audit_page import write_page
    from megapsft.train.plan import check_minibatch, layout_of

    if rows < 0:
        raise Refused(f"--rows {rows}", "must not be negative", "use 0 to show none")
    check_file("--html", html)
    check_file("--json", json)
    resolved = load_config(config, OVERRIDES)
    check_minibatch(resolved.train)
    hf = read_config(resolved.model.path)
    world, _ = world_of(resolved.parallel, None)
    mesh = plan_mesh(resolved.parallel, world, model_shape(hf), has_cuda(), resolved.model.moe_token_dispatcher_type)
    template = ChatTemplate.load(resolved.model.path)
    problems = problems_of(resolved, eval, template)
    with progress() as advance:
        found = look(
            resolved, template, hf.vocab_size, layout_of(resolved, mesh), evaluation=problems, rows=rows, advance=advance
        )
    show_audit(found)
    if html is not None:
        write_page(found, html)
        print(f"wrote {html}")
    if json is not None:
        write_audit(found, json)
        print(f"wrote {json}")
    return WARNED if strict and found.warnings else 0


def problems_of(config: Config, files: tuple[Path, ...], template: ChatTemplate) -> list[Problem]:
    """The problems of evaluate.data, and of further files."""
    from megapsft.audit.across import Problem
    from megapsft.evaluate.benchmark import load_benchmark

    problems = []
    for path in dict.fromkeys([*config.evaluate.data, *map(str, files)]):
        for problem in load_benchmark(path, template, needs_reference=False).problems:
            asked = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
            problems.append(Problem(source=problem.source, text=asked))
    return problems


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        tasks: dict[str, int] = {}

        def advance(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=of)
            shown.advance(tasks[what], done)

        yield advance
