"""Every row of a file as the loaders of `megapsft.data` make it, also those that they refuse: an audit does not end at the first.

The ids, the masks and the cuts are those of the loaders: a test compares the groups with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from megapsft.audit.roles import ROLE, roles_of_prompt, roles_of_response
from megapsft.config import Config, DataConfig
from megapsft.data.chat_template import ROWS_AT_ONCE, ChatTemplate
from megapsft.data.dataset import check_selects_nothing, fitting_length
from megapsft.data.preferences import SIDES, check_ref_logprobs, parse_preference
from megapsft.data.prompts import parse_problem
from megapsft.data.recorded import is_text, parse_recorded
from megapsft.data.rollouts import check_response, check_selection, choose, to_sample
from megapsft.data.rows import Prompt, Record, check_columns, named, parse_row, read_whole_records
from megapsft.errors import Refused
from megapsft.types import Group, Objective, Sample

DROPS = {  # why a sample is not trained -> what that means
    "refused": "the run would not start with this row",
    "too long": "longer than data.max_length, and data.overlong=drop",
    "no room": "the prompt leaves no room for a response within data.max_length",
    "other side": "the other response of the pair is dropped",
    "identical": "chosen and rejected have the same tokens, which prefers nothing",
    "not selected": "data.select keeps other rollouts",
    "left out": "the objective does not train such samples",
}


Fate = tuple[str | None, int]  # key of DROPS, or None; and how many tokens are kept


@dataclass(frozen=True, kw_only=True)
class AuditedSample:
    """One sequence: a prompt with a response, or a bare prompt whose responses will be sampled."""

    name: str  # "demonstration", "chosen", "rejected", "rollout 2" or "prompt"
    token_ids: np.ndarray  # [n] int32, before it is cut
    roles: np.ndarray  # [n] int8, index into ROLES
    prompt_length: int  # tokens
    loss_mask: np.ndarray  # [n] bool: True on what is trained, False all over where it is dropped
    kept: int  # the first so many tokens go into training
    text: str | None = None  # the response as it stands in the file; None where the file has its token ids, or there is none
    finished: bool = True  # False: the engine that sampled cut it
    demonstration: bool = True  # False: a policy sampled it, or will
    reward: float = 0.0
    dropped: str | None = None  # key of DROPS

    @property
    def truncated(self) -> bool:
        return self.dropped is None and self.kept < len(self.token_ids)

    @property
    def response(self) -> np.ndarray:
        """Token ids behind the prompt, before they are cut."""
        return self.token_ids[self.prompt_length :]


@dataclass(frozen=True, kw_only=True)
class AuditedRow:
    """One row of the file and what becomes of it."""

    number: int  # line, or row of a Parquet file, from 1
    prompt: Prompt | list[int] | None  # None where it is refused before it is known
    samples: tuple[AuditedSample, ...]
    reference: str | None = None  # the right answer, of data.kind=prompts
    refused: str | None = None  # what the loader says

    def groups(self, config: DataConfig) -> list[Group]:
        """What the loader and the objective leave of the row: one group, or where data.select chooses, one of each rollout."""
        kept = tuple(
            Sample(
                token_ids=sample.token_ids[: sample.kept],
                loss_mask=sample.loss_mask[: sample.kept],
                source=str(self.number),
                demonstration=sample.demonstration,
                reward=sample.reward,
            )
            for sample in self.samples
            if sample.dropped is None
        )
        if config.select is not None:
            return [(sample,) for sample in kept]
        return [kept] if kept else []


@dataclass(frozen=True, kw_only=True)
class Response:
    """A response before it is tokenised."""

    name: str
    words: str | list[int]  # token ids are used as they are
    finished: bool = True
    demonstration: bool = True
    reward: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A row before it is tokenised."""

    number: int
    source: str
    prompt: Prompt | list[int] | None = None
    responses: tuple[Response, ...] = ()
    check: Callable[[list[list[int]]], None] = lambda ids: None  # refuses what the file says of the responses' tokens
    reference: str | None = None
    refused: str | None = None


def read_records(config: DataConfig) -> list[Record]:
    """The rows of `data.path`, or the first `limit`.

    Raises:
        Refused: the file cannot be read, or its first row lacks a column; options of selection that are not read.
    """
    (check_selection if config.kind in ("rollouts", "prompts") else check_selects_nothing)(config)
    required, optional, _ = KINDS[config.kind]
    records = read_whole_records(config.path, config.columns, (), optional, config.limit)
    source, first = records[0]
    check_columns(first, named(config.columns, required), source)
    return records


def audit_rows(
    records: Sequence[Record], config: Config, objective: Objective, template: ChatTemplate, vocab_size: int
) -> Iterator[AuditedRow]:
    """Each record as the loader of `data.kind` makes it, tokenised many at a time.

    Args:
        vocab_size: rows of the model's embedding.
    """
    for start in range(0, len(records), ROWS_AT_ONCE):
        parsed = [_parse(record, config.data) for record in records[start : start + ROWS_AT_ONCE]]
        prompts = iter(_prompts(parsed, config.data, template))
        encoded = [next(prompts) if row.prompt is not None else None for row in parsed]
        answers = iter(_responses(parsed, template))
        for row, prompt in zip(parsed, encoded, strict=True):
            ids = [next(answers) for _ in row.responses]
            yield _audit(row, prompt, ids, config, objective, vocab_size)


def _parse(record: Record, config: DataConfig) -> Parsed:
    source, fields = record
    number = int(source.rpartition(":")[2])
    required, _, parse = KINDS[config.kind]
    try:
        check_columns(fields, named(config.columns, required), source)
        return parse(fields, config, source, number)
    except Refused as refusal:
        return Parsed(number=number, source=source, refused=str(refusal))


def _demonstration(record: dict[str, Any], config: DataConfig, source: str, number: int) -> Parsed:
    row = parse_row(record, config.columns, source)
    responses = (Response(name="demonstration", words=row.demonstration),)
    return Parsed(number=number, source=source, prompt=row.prompt, responses=responses)


def _preference(record: dict[str, Any], config: DataConfig, source: str, number: int) -> Parsed:
    row = parse_preference(record, config.columns, source)
    responses = tuple(Response(name=name, words=words) for name, words in zip(SIDES, row.responses, strict=True))
    check = partial(check_ref_logprobs, row, columns=config.columns)
    return Parsed(number=number, source=source, prompt=row.prompt, responses=responses, check=check)


def _recorded(record: dict[str, Any], config: DataConfig, source: str, number: int) -> Parsed:
    row = parse_recorded(record, config.columns, source)
    responses = [
        Response(
            name=f"rollout {place}",
            words=rollout.response,
            finished=rollout.finished,
            demonstration=False,
            reward=rollout.reward,
        )
        for place, rollout in enumerate(row.rollouts, start=1)
    ]
    if row.demonstration is not None and config.select is None:
        responses.append(Response(name="demonstration", words=row.demonstration, reward=row.demonstration_reward))

    def check(ids: list[list[int]]) -> None:
        for rollout, response in zip(row.rollouts, ids, strict=False):  # behind them the demonstration
            check_response(rollout, response)

    return Parsed(number=number, source=source, prompt=row.prompt, responses=tuple(responses), check=check)


def _problem(record: dict[str, Any], config: DataConfig, source: str, number: int) -> Parsed:
    prompt, reference, text = parse_problem(record, config.columns, source)
    responses = () if text is None else (Response(name="demonstration", words=text, reward=1.0),)
    return Parsed(number=number, source=source, prompt=prompt, responses=responses, reference=reference)


KINDS = {  # data.kind -> columns that rows have, columns that they may have, and who reads a row
    "demonstrations": (("prompt", "demonstration"), (), _demonstration),
    "preferences": (("prompt", *SIDES), ("chosen_ref_logprobs", "rejected_ref_logprobs"), _preference),
    "rollouts": (("rollouts",), ("prompt", "prompt_token_ids", "demonstration", "demonstration_reward"), _recorded),
    "prompts": (("prompt",), ("reference", "demonstration"), _problem),
}


@dataclass(frozen=True)
class Encoded:
    """Token ids, and what was refused of them."""

    ids: list[int]
    roles: np.ndarray  # [n] int8
    refused: str | None = None


def _prompts(parsed: list[Parsed], config: DataConfig, template: ChatTemplate) -> Iterator[Encoded]:
    """The prompts of the rows that have one."""
    rendered: list[str | Refused | None] = []
    for row in parsed:
        if row.prompt is None or not is_text(row.prompt):
            rendered.append(None)
            continue
        try:
            rendered.append(template.render_prompt(row.prompt, config.system_prompt))
        except Refused as refusal:
            rendered.append(refusal)
    texts = [text for text in rendered if isinstance(text, str)]
    ids, ends = template.tokenise_with_ends(texts)
    place = 0
    for row, text in zip(parsed, rendered, strict=True):
        if isinstance(text, Refused):
            yield Encoded([], np.zeros(0, np.int8), f"{row.source}: {text}")
        elif isinstance(text, str):
            of_text = None if ends is None else ends[place]
            roles = roles_of_prompt(text, row.prompt, config.system_prompt, of_text, len(ids[place]))
            yield Encoded(ids[place], roles, _not_text(ids[place], text, row.source, template))
            place += 1
        elif row.prompt is not None:
            roles = np.full(len(row.prompt), ROLE["prompt"], np.int8)
            yield Encoded(row.prompt, roles, _not_text(row.prompt, "", row.source, template))


def _not_text(ids: list[int], text: str, source: str, template: ChatTemplate) -> str | None:
    """Why the loader refuses a prompt with an image in it."""
    try:
        template.check_text(ids, source, text)
    except Refused as refusal:
        return str(refusal)
    return None


def _responses(parsed: list[Parsed], template: ChatTemplate) -> Iterator[Encoded]:
    """The responses of the rows, one row after the other."""
    responses = [(row.source, response) for row in parsed for response in row.responses]
    words = [(source, response) for source, response in responses if isinstance(response.words, str)]
    tokenised = iter(_tolerantly(words, template))
    for _, response in responses:
        ids, refused = next(tokenised) if isinstance(response.words, str) else (response.words, None)
        yield Encoded(ids, roles_of_response(ids, template), refused)


def _tolerantly(words: list[tuple[str, Response]], template: ChatTemplate) -> list[tuple[list[int], str | None]]:
    """Ids of each response as the loader makes them; where it refuses one, halves are tried until that one is alone."""
    try:
        sources = [f"{source}: {response.name}" for source, response in words]
        finished = [response.finished for _, response in words]
        return [(ids, None) for ids in template.encode_responses([r.words for _, r in words], sources, finished)]
    except Refused as refusal:
        if len(words) == 1:
            (ids,) = template.tokenise([words[0][1].words])
            return [([*ids, template.terminator_id], str(refusal))]
        half = len(words) // 2
        return _tolerantly(words[:half], template) + _tolerantly(words[half:], template)


def _audit(
    row: Parsed, prompt: Encoded | None, responses: list[Encoded], config: Config, objective: Objective, vocab_size: int
) -> AuditedRow:
    """What becomes of a row that is tokenised."""
    if prompt is None:
        return AuditedRow(number=row.number, prompt=None, samples=(), refused=row.refused)
    refused = next((part.refused for part in (prompt, *responses) if part.refused), None)
    whole = [np.array([*prompt.ids, *response.ids], dtype=np.int32) for response in responses]
    fates: list[Fate] = [("refused", 0)] * len(whole)
    bare: Fate = ("refused", 0)
    try:
        if refused is None:
            row.check([response.ids for response in responses])
            _check_vocabulary([np.array(prompt.ids, dtype=np.int32), *whole], vocab_size, row.source)
            bare = _fate_of_prompt(row, len(prompt.ids), config)
            fates = _fates(row, whole, len(prompt.ids), config, objective) if bare[0] is None else [bare] * len(whole)
    except Refused as refusal:
        refused = str(refusal)
    parts = list(zip(row.responses, responses, whole, fates, strict=True))
    if config.data.kind == "prompts" and not any(dropped is None for dropped, _ in fates):
        nothing = Encoded([], np.zeros(0, np.int8))
        to_be_sampled = Response(name="prompt", words=[], demonstration=False)
        parts.insert(0, (to_be_sampled, nothing, np.array(prompt.ids, dtype=np.int32), bare))
    samples = tuple(
        AuditedSample(
            name=response.name,
            token_ids=ids,
            roles=np.concatenate([prompt.roles, encoded.roles]),
            prompt_length=len(prompt.ids),
            loss_mask=(np.arange(len(ids)) >= len(prompt.ids)) & (np.arange(len(ids)) < kept),
            kept=kept,
            text=response.words if isinstance(response.words, str) else None,
            finished=response.finished,
            demonstration=response.demonstration,
            reward=response.reward,
            dropped=dropped,
        )
        for response, encoded, ids, (dropped, kept) in parts
    )
    return AuditedRow(number=row.number, prompt=row.prompt, samples=samples, reference=row.reference, refused=refused)


def _check_vocabulary(whole: list[np.ndarray], vocab_size: int, source: str) -> None:
    largest = max((int(ids.max()) for ids in whole if len(ids)), default=0)
    if largest >= vocab_size:
        rule = f"holds token {largest}, and the embedding has {vocab_size} rows"
        raise Refused(source, rule, "use the tokenizer that belongs to the model in model.path")


def _fate_of_prompt(row: Parsed, prompt_length: int, config: Config) -> Fate:
    """What becomes of a prompt that responses are sampled to; of others their responses decide.

    Raises:
        Refused: it leaves them no room, and overlong=error.
    """
    needed = prompt_length + config.rollout.max_tokens
    if config.data.kind == "prompts" and fitting_length(needed, prompt_length, config.data, row.source) is None:
        return "no room", 0
    return None, prompt_length


def _fates(row: Parsed, whole: list[np.ndarray], prompt_length: int, config: Config, objective: Objective) -> list[Fate]:
    """What becomes of each sequence of a row that nothing refused.

    Raises:
        Refused: it is too long, and overlong=error.
    """
    data = config.data
    fates = [_fate(ids, prompt_length, data, f"{row.source}: {r.name}") for r, ids in zip(row.responses, whole, strict=True)]
    if data.kind == "preferences":
        return _fates_of_pair(fates, whole)
    if data.kind == "rollouts":
        return _fates_of_group(row, whole, fates, data, objective)
    if data.kind == "prompts":
        imitated = data.select is None and list(objective.keep([1.0, 0.0], [True, False]))[0]  # beside a wrong rollout
        return [fate if fate[0] or imitated else ("left out", 0) for fate in fates]
    return fates


def _fate(ids: np.ndarray, prompt_length: int, config: DataConfig, source: str) -> Fate:
    kept = fitting_length(len(ids), prompt_length, config, source)
    if kept is None:
        return ("no room" if prompt_length >= config.max_length else "too long"), 0
    return None, kept


def _fates_of_pair(fates: list[Fate], whole: list[np.ndarray]) -> list[Fate]:
    if any(dropped for dropped, _ in fates):
        return [fate if fate[0] else ("other side", 0) for fate in fates]
    chosen, rejected = (ids[:kept] for ids, (_, kept) in zip(whole, fates, strict=True))
    return [("identical", 0)] * 2 if np.array_equal(chosen, rejected) else fates


def _fates_of_group(
    row: Parsed, whole: list[np.ndarray], fates: list[Fate], config: DataConfig, objective: Objective
) -> list[Fate]:
    """Rollouts and their demonstration: `data.select` and the objective say what is left out."""
    fitting = [place for place, (dropped, _) in enumerate(fates) if dropped is None]
    samples = [_sample(row.responses[place], whole[place], fates[place][1]) for place in fitting]
    if not samples:
        return fates
    if config.select is not None:
        chosen = {id(sample) for sample in choose(tuple(samples), config)}
        flags, why = [id(sample) in chosen for sample in samples], "not selected"
    else:
        flags, why = objective.keep([s.reward for s in samples], [s.demonstration for s in samples]), "left out"
    gone = {place for place, flag in zip(fitting, flags, strict=True) if not flag}
    return [(why, 0) if place in gone else fate for place, fate in enumerate(fates)]


def _sample(response: Response, ids: np.ndarray, kept: int) -> Sample:
    return to_sample([], ids[:kept].tolist(), "", response.demonstration, response.reward, None)
