"""The results as JSON and as one HTML page: both from what came of the runs alone."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from evidence.claims import CLAIMS, Claim
from evidence.plan import RULE
from evidence.results import Results, at_the_end, final, from_json, mean, to_json
from evidence.sizes import FULL, Sizes
from evidence.tasks import Amounts
from evidence.verdict import Verdict
from megapsft.output.whole import write_whole
from megapsft.report.figure import Grid
from megapsft.report.html import figure
from megapsft.report.style import document, section

TITLE = "What the papers found, on a tiny model"
SMALL = "At other sizes than the whole has: it shows that everything runs, and says nothing of the papers."
PACKAGES = ("megatron-core", "torch", "transformers")  # whose versions decide what a run computes
INTERVALS = "A ± is a 95 % interval by Student's t over seeds; a difference is paired by seed."


def judge_all(results: Results, sizes: Sizes) -> dict[str, Verdict]:
    """By the letter of the claim."""
    return {claim.letter: claim.judge(results, sizes) for claim in CLAIMS}


def write_json(results: Results, sizes: Sizes, path: Path) -> None:
    """Day and versions, sizes, what came of every run, what became of every claim; the old file or the new one."""
    verdicts = judge_all(results, sizes)
    claims = {claim.letter: _words(claim) | verdicts[claim.letter].to_json() for claim in CLAIMS}
    tree = {"made": made_with(), "sizes": asdict(sizes), "claims": claims, "methods": to_json(results)}
    write_whole(path, json.dumps(tree, allow_nan=False, default=vars, separators=(",", ":")) + "\n")


def made_with() -> dict[str, str]:
    """The day, and name -> version of what the runs were done with."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"date": datetime.now(UTC).date().isoformat(), "Python": platform.python_version(), **versions}


def read_json(path: Path) -> tuple[Results, Sizes, dict[str, str]]:
    """What `write_json` wrote, but for the verdicts, which follow from it: results, sizes, and day and versions."""
    tree: Mapping[str, Any] = json.loads(path.read_text())
    sizes = tree["sizes"] | {"amounts": Amounts(**tree["sizes"]["amounts"]), "seeds": tuple(tree["sizes"]["seeds"])}
    return from_json(tree["methods"]), Sizes(**sizes), tree["made"]


def write_page(results: Results, sizes: Sizes, made: Mapping[str, str], path: Path) -> None:
    """The page, which needs nothing else."""
    verdicts = judge_all(results, sizes)
    whole = [
        section("Claims", figure(claim_table(verdicts))),
        *(_section(claim, verdicts[claim.letter], results, sizes) for claim in CLAIMS),
    ]
    whole += [
        section("Methods", figure(method_table(results))),
        section("Learning rates", figure(rate_table(results))),
        section("How it was made", f"<p>{escape(_made(results, sizes, made))}</p>"),
    ]
    small = "" if sizes == FULL else f"<p><b>{escape(SMALL)}</b></p>"
    write_whole(path, document(TITLE, f"<h1>{escape(TITLE)}</h1>{small}" + "".join(whole)))


def claim_table(verdicts: Mapping[str, Verdict]) -> Grid:
    """A row for each claim."""
    rows = [(claim.letter, claim.title, verdicts[claim.letter].outcome, _numbers(verdicts[claim.letter])) for claim in CLAIMS]
    heading = ("", "claim", "here it", "decided by")
    return Grid(name="claims", title="What became of every claim", heading=heading, rows=rows, note=INTERVALS)


def method_table(results: Results) -> Grid:
    """A row for each method: what it trained on, its learning rate and what else was tried, and how it ended."""
    rows = []
    for name, one in results.items():
        tried = ", ".join(f"{rate:g}: {final('valid')(run):.3f}" for rate, run in one.trials.items()) or "none of its own"
        found = (str(mean(results, name, final(family))) for family in ("in", "out"))
        rows.append((name, f"{one.samples:,}", f"{one.rate:g}", tried, *found))
    heading = ("method", "samples", "learning rate", "tried: validation accuracy", "in-domain", "out of domain")
    note = f"Learning rate: {RULE}. A method without a trial of its own is a variant, and takes that of PSFT."
    return Grid(name="methods", title="Every method", heading=heading, rows=rows, numbers=frozenset({1, 2, 4, 5}), note=note)


def rate_table(results: Results) -> Grid:
    """A row for each learning rate of the methods that have several, and how the run with it ended."""
    rows = []
    for name, one in results.items():
        for rate, run in one.trials.items() if len(one.trials) > 1 else ():
            accuracies = (f"{final(family)(run):.3f}" for family in ("valid", "in", "out"))
            entropy = f"{at_the_end('entropy')(run):.3f}" if "entropy" in run.curves else ""
            rows.append((name, f"{rate:g}", "taken" if rate == one.rate else "", *accuracies, entropy))
    heading = ("method", "learning rate", "", "validation", "in-domain", "out of domain", "entropy at the end (nats)")
    note = (
        "The first seed alone. Where two methods were given different rates, a difference between them is also one of rates: "
        "rows of one rate show what the objectives do."
    )
    return Grid(name="rates", title="Every trial", heading=heading, rows=rows, numbers=frozenset({1, 3, 4, 5, 6}), note=note)


def _section(claim: Claim, verdict: Verdict, results: Results, sizes: Sizes) -> str:
    paragraphs = (
        f"<p><b>Here it {escape(verdict.outcome)}</b>: {escape(_numbers(verdict))}.</p>",
        f'<p class="soft">Criterion, fixed before there were results: {escape(claim.criterion)}; it holds where the 95 % '
        "interval of each difference lies above 0, does not where one lies below or all are 0, and else is undecided. "
        f"Source: {escape(claim.source)}.</p>",
    )
    beside = [(name, str(one)) for name, one in verdict.beside.items()]
    table = Grid(name=f"{claim.letter}-beside", title="Beside it", heading=("number", "value"), rows=beside, note=INTERVALS)
    figures = "".join(figure(one) for one in (*claim.draw(results, sizes), table))
    return section(f"({claim.letter}) {claim.title}", "".join(paragraphs) + f'<div class="figures">{figures}</div>')


def _words(claim: Claim) -> dict[str, str]:
    return {"title": claim.title, "source": claim.source, "criterion": claim.criterion}


def _numbers(verdict: Verdict) -> str:
    return "; ".join(f"{name}: {one}" for name, one in verdict.decided_by.items())


def _made(results: Results, sizes: Sizes, made: Mapping[str, str]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made.items() if name != "date")
    runs = [run for one in results.values() for run in one.runs.values()]
    spent = sum(run.core_seconds for run in runs)
    return (
        f"{len(sizes.seeds)} seeds, each with a model of its own that was pretrained on both families of problems and then "
        f"fine-tuned on {sizes.amounts.demonstrations} demonstrations of one, {sizes.steps * sizes.batch:,} samples in "
        f"{sizes.steps * sizes.batch // sizes.amounts.demonstrations} epochs. Accuracy is that of one response at temperature 1 "
        f"to each of {sizes.amounts.problems} problems that no run was trained on. The {len(runs)} runs of this page took "
        f"{spent:,.0f} core-seconds, those for learning rates come on top. Written on {made['date']}, with {versions}. `make "
        "evidence` makes all of it again; what the problems are, and what this cannot show, is in docs/evidence.md."
    )
