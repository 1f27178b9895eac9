"""A file looked at as a whole: every rule over every row, counts, and some rows to be shown."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np

from megapsft.audit.across import MOST_NEAR, RULES_ACROSS, Problem, Summary, Together, summarise
from megapsft.audit.lengths import Histogram, Packing, histogram, packing
from megapsft.audit.roles import ROLES
from megapsft.audit.rows import DROPS, AuditedRow, AuditedSample, audit_rows, read_records
from megapsft.audit.rule import Rule
from megapsft.audit.rules import ROW_RULES, Context
from megapsft.audit.spans import Span, spans
from megapsft.config import Config
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.plan import Layout
from megapsft.objectives.registry import build_objective

Advance = Callable[[str, int, int], None]  # (what is done, how many more of them are done, of how many)


@dataclass(frozen=True, kw_only=True)
class Warned:
    """What one rule found."""

    rule: Rule
    found: tuple[tuple[int, str], ...]  # (row, what is wrong there), in the order of the file

    @property
    def rows(self) -> tuple[int, ...]:
        """Each once, ascending."""
        return tuple(sorted({row for row, _ in self.found}))


@dataclass(frozen=True, kw_only=True)
class OfRole:
    """Tokens of one role that go into training, and how many of them have a loss."""

    role: str
    tokens: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Samples that are not trained for one reason."""

    reason: str  # key of DROPS
    samples: int
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    name: str
    fate: str  # "trained", "truncated", "to be sampled", or why it is dropped
    tokens: int
    trained: int
    terminators: int  # in the response, behind its cut not
    reward: float | None  # of rollouts
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    number: int
    samples: tuple[ShownSample, ...]
    warnings: tuple[tuple[str, str], ...]  # (rule, what is wrong)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """All that there is to say; `to_dict` is what --json writes."""

    path: str
    kind: str
    objective: str
    model: str
    rows: int
    rows_trained: int  # with a sample that goes into training
    samples: int
    samples_trained: int  # or to be sampled
    truncated: int  # of these
    tokens: int  # of these, after the cut
    tokens_trained: int
    one_terminator: int  # responses that end with exactly one terminator
    responses: int  # that should: trained, not truncated, and finished
    roles: tuple[OfRole, ...]
    histograms: tuple[Histogram, ...]
    packing: Packing | None
    drops: tuple[Drop, ...]
    warnings: tuple[Warned, ...]
    shown: tuple[ShownRow, ...]
    notes: tuple[str, ...]  # what was sampled, and what was not looked at

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        whole = dataclasses.asdict(self)
        whole["warnings"] = [
            {
                "rule": warned.rule.name,
                "meaning": warned.rule.meaning,
                "remedy": warned.rule.remedy,
                "rows": list(warned.rows),
                "found": [{"row": row, "what": what} for row, what in warned.found],
            }
            for warned in self.warnings
        ]
        whole["drops"] = [{"reason": drop.reason, "meaning": DROPS[drop.reason], "samples": drop.samples, "rows": list(drop.rows)}
                          for drop in self.drops]  # fmt: skip
        for row, shown in zip(whole["shown"], self.shown, strict=True):
            row["warnings"] = [{"rule": name, "what": what} for name, what in shown.warnings]
        if self.packing is not None:
            whole["packing"]["filled"] = self.packing.filled
        return whole


@dataclass
class Counts:
    """What adds up while rows go by."""

    rows_trained: int = 0
    samples: int = 0
    samples_trained: int = 0
    truncated: int = 0
    one_terminator: int = 0
    responses: int = 0
    of_roles: np.ndarray = field(default_factory=lambda: np.zeros((len(ROLES), 2), np.int64))  # tokens, trained
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"prompt": [], "response": [], "together": []})
    groups: list[list[tuple[int, int]]] = field(default_factory=list)  # (tokens, trained tokens) of each sample
    drops: dict[str, Counter[int]] = field(default_factory=dict)  # reason -> row -> samples

    def add(self, row: AuditedRow, config: Config, stop_token_ids: Sequence[int]) -> None:
        for group in row.groups(config.data):
            self.groups.append([(len(sample), int(sample.loss_mask.sum())) for sample in group])
        self.rows_trained += any(sample.dropped is None for sample in row.samples)
        if row.refused is not None:
            self.drops.setdefault("refused", Counter())[row.number] += max(len(row.samples), 1)
        for number, sample in enumerate(row.samples):
            self.samples += 1
            if number == 0:
                self.lengths["prompt"].append(sample.prompt_length)
            if len(sample.response):
                self.lengths["response"].append(len(sample.response))
                self.lengths["together"].append(len(sample.token_ids))
            if sample.dropped is not None:
                if sample.dropped != "refused":
                    self.drops.setdefault(sample.dropped, Counter())[row.number] += 1
                continue
            self.samples_trained += 1
            self.truncated += sample.truncated
            kept = slice(0, sample.kept)
            self.of_roles[:, 0] += np.bincount(sample.roles[kept], minlength=len(ROLES))
            self.of_roles[:, 1] += np.bincount(sample.roles[kept][sample.loss_mask[kept]], minlength=len(ROLES))
            if len(sample.response) and sample.finished and not sample.truncated:
                ends = np.isin(sample.response, stop_token_ids)
                self.responses += 1
                self.one_terminator += bool(ends[-1] and ends.sum() == 1)


def audit(
    config: Config,
    template: ChatTemplate,
    vocab_size: int,
    layout: Layout,
    *,
    evaluation: Sequence[Problem] = (),
    rows: int = 20,
    advance: Advance = lambda what, done, of: None,
) -> Audit:
    """Looks at every row of `data.path`.

    Args:
        vocab_size: rows of the model's embedding.
        layout: how the run packs.
        evaluation: problems that should not be among the prompts.
        rows: how many are shown, half of them with warnings where there are any.

    Raises:
        Refused: as `read_records`.
    """
    records = read_records(config.data)
    objective = build_objective(config.objective)
    context = Context.of(template, wants_answer(config))
    counts, summaries = Counts(), []
    found: dict[Rule, list[tuple[int, str]]] = {rule: [] for rule in (*ROW_RULES, *RULES_ACROSS)}
    for row in audit_rows(records, config, objective, template, vocab_size):
        counts.add(row, config, template.stop_token_ids)
        summaries.append(summarise(row, template))
        for rule, find in ROW_RULES.items():
            found[rule] += ((row.number, what) for what in find(row, context))
        advance("rows", 1, len(records))
    found |= across(summaries, evaluation, advance)
    warnings = tuple(Warned(rule=rule, found=tuple(what)) for rule, what in found.items() if what)
    numbers = choose_rows(len(records), rows, warnings)
    some = [records[number - 1] for number in numbers]
    plan = packing(counts.groups, config, layout) if config.data.kind != "prompts" else None
    return Audit(
        path=config.data.path,
        kind=config.data.kind,
        objective=config.objective["name"],
        model=config.model.path,
        rows=len(records),
        rows_trained=counts.rows_trained,
        samples=counts.samples,
        samples_trained=counts.samples_trained,
        truncated=counts.truncated,
        tokens=int(counts.of_roles[:, 0].sum()),
        tokens_trained=int(counts.of_roles[:, 1].sum()),
        one_terminator=counts.one_terminator,
        responses=counts.responses,
        roles=tuple(
            OfRole(role=role, tokens=tokens, trained=trained)
            for role, (tokens, trained) in zip(ROLES, counts.of_roles.tolist(), strict=True)
            if tokens
        ),
        histograms=tuple(histograms(counts.lengths, config)),
        packing=plan,
        drops=tuple(
            Drop(reason=reason, samples=counts.drops[reason].total(), rows=tuple(sorted(counts.drops[reason])))
            for reason in DROPS
            if reason in counts.drops
        ),
        warnings=warnings,
        shown=tuple(show(row, warnings, template) for row in audit_rows(some, config, objective, template, vocab_size)),
        notes=tuple(notes(config, len(records), numbers, plan, evaluation)),
    )


def wants_answer(config: Config) -> bool:
    """Whether a reward of the run reads the final answer of a response."""
    names = {entry.get("name") for entry in config.rewards}
    if config.evaluate.data:
        names.add(config.evaluate.reward)
    return "math_answer" in names


def across(
    summaries: Sequence[Summary], evaluation: Sequence[Problem], advance: Advance
) -> Mapping[Rule, list[tuple[int, str]]]:
    """What is wrong with the rows taken together."""
    compared = min(len(summaries), MOST_NEAR)
    together = Together(rows=summaries, evaluation=evaluation, advance=lambda done: advance("near duplicates", done, compared))
    return {rule: list(find(together)) for rule, find in RULES_ACROSS.items()}


def histograms(lengths: Mapping[str, Sequence[int]], config: Config) -> Iterator[Histogram]:
    data = config.data
    sampled = {"data.max_length - rollout.max_tokens": data.max_length - config.rollout.max_tokens}
    limits = {"prompt": sampled if data.kind == "prompts" else {}, "together": {"data.max_length": data.max_length}}
    for name, values in lengths.items():
        made = histogram(name, values, limits.get(name, {}))
        if made is not None:
            yield made


def choose_rows(count: int, wanted: int, warnings: Sequence[Warned]) -> list[int]:
    """Up to `wanted` of the rows 1, ..., `count`, ascending: half of them by warning, in turn, and the others evenly spaced."""
    in_turn = zip_longest(*(warned.rows for warned in warnings))
    warned = list(dict.fromkeys(row for turn in in_turn for row in turn if row is not None))[: -(-wanted // 2)]
    others = sorted(set(range(1, count + 1)) - set(warned))
    left = min(len(others), wanted - len(warned))
    return sorted([*warned, *(others[(2 * number + 1) * len(others) // (2 * left)] for number in range(left))])


def show(row: AuditedRow, warnings: Sequence[Warned], template: ChatTemplate) -> ShownRow:
    """What is shown of a row."""
    samples = tuple(
        ShownSample(
            name=sample.name,
            fate=sample.dropped
            or ("truncated" if sample.truncated else "trained" if len(sample.response) else "to be sampled"),
            tokens=len(sample.token_ids),
            trained=int(sample.loss_mask.sum()),
            terminators=int(np.isin(whole_or_kept(sample), template.stop_token_ids).sum()),
            reward=None if sample.demonstration or not len(sample.response) else sample.reward,
            spans=spans(sample, template),
        )
        for sample in row.samples
    )
    own = tuple((warned.rule.name, what) for warned in warnings for number, what in warned.found if number == row.number)
    return ShownRow(number=row.number, samples=samples, warnings=own)


def whole_or_kept(sample: AuditedSample) -> np.ndarray:
    """The response as it is trained, or where it is not, as it would be."""
    return sample.token_ids[sample.prompt_length : None if sample.dropped else sample.kept]


def notes(
    config: Config, count: int, numbers: Sequence[int], plan: Packing | None, evaluation: Sequence[Problem]
) -> Iterator[str]:
    """What was sampled, and what was not looked at."""
    yield f"Every rule was applied to all {count:,} rows; {len(numbers)} of them are shown."
    if config.data.limit is not None:
        yield f"Rows behind data.limit={config.data.limit} were not read."
    if count > MOST_NEAR:
        yield f"Near duplicates were looked for among the first {MOST_NEAR:,} rows."
    if plan is not None and plan.updates < plan.of_updates:
        yield f"Packing is that of {plan.updates} updates, evenly spaced over the {plan.of_updates:,} of an epoch."
    if plan is None and config.data.kind == "prompts":
        yield "Packing is not known before responses are sampled."
    if not evaluation:
        yield "Overlap was not looked for: neither evaluate.data nor --eval names a file."
