"""The training set of recorded rollouts: every row of the file as a group of Samples that fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megapsft.config import DataConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.dataset import Dataset, check_not_empty, check_vocabulary, fitting_length
from megapsft.data.progress import watched
from megapsft.data.recorded import RecordedPrompt, Rollout, is_text, read_rollouts
from megapsft.data.select import first_of_each, raft, rft
from megapsft.errors import Refused
from megapsft.types import Group, Sample


@dataclass(frozen=True, kw_only=True)
class Rollouts(Dataset):
    """Each group is the rollouts of one prompt in their order, and behind them its demonstration, if it has one.

    With `data.select` each group is one rollout that was kept.
    """

    rollouts: int  # read
    overlong: int  # of them: dropped
    unfinished: int  # of those that fit: cut by the engine
    demonstrations: int  # in the groups
    singletons: int  # groups of one
    equal: int  # groups of several whose rewards are all equal
    selected: int | None  # rollouts that `data.select` kept
    not_selected: int  # prompts of which it kept nothing
    weight_versions: tuple[int, ...]  # in the file, ascending

    @property
    def notes(self) -> tuple[str, ...]:
        read = f"{self.rollouts} rollouts, {self.unfinished} of them cut by the engine"
        notes = [f"{read}, and {self.demonstrations} demonstrations."]
        if self.overlong:
            notes.append(f"{self.overlong} of {self.rollouts} rollouts dropped: too long.")
        if self.selected is not None:
            kept = f"{self.selected} of {self.rollouts} rollouts selected ({self.selected / self.rollouts:.1%})"
            notes.append(f"{kept}; {self.not_selected} of {self.rows} prompts have none.")
        elif self.equal or self.singletons:
            spread = f"{self.equal} of {len(self.groups)} groups have equal rewards and {self.singletons} one member"
            notes.append(f"{spread}: rewards say nothing there.")
        if len(self.weight_versions) > 1:
            versions = f"{self.weight_versions[0]}..{self.weight_versions[-1]}"
            notes.append(f"the rollouts are of {len(self.weight_versions)} weight versions ({versions}).")
        return tuple(notes)


def load_rollouts(config: DataConfig, template: ChatTemplate, vocab_size: int) -> Rollouts:
    """Reads, tokenises where there are texts, and fits all rows of `config.path`; loss_mask is True on the responses.

    A text gets the template's terminator unless the rollout is not finished; token ids are never decoded and encoded again. A
    sample longer than `max_length` is dropped, cut on the right, or refused, as `overlong` says, and a group of which nothing is
    left is dropped. Where the file has log-probabilities they become `Sample.rollout_logprobs`, 0 all over for demonstrations,
    which no engine sampled.

    With `select` the demonstrations are left out, and of the rollouts that fit those are kept that it chooses, each a group of
    its own: what SFT and DFT train on in RFT and RAFT.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        Refused: what `read_rollouts` and `ChatTemplate` refuse; log-probabilities that are not one for each response token; an
            overlong sample where overlong=error; nothing left; a token id that the embedding does not have; options of
            selection that it does not use.
    """
    check_selection(config)
    rows = read_rollouts(config)
    check_token_ids(rows, template, vocab_size)
    with watched(fit_rows(rows, config, template), f"{config.path}: tokenised", len(rows)) as coming:
        fitted = list(coming)
    groups = [row.group for row in fitted if row.group]
    check_not_empty(groups, config, len(rows), max(row.longest for row in fitted))
    not_selected = 0
    if config.select is not None:
        chosen = [choose(group, config) for group in groups]
        not_selected = chosen.count([])
        groups = [(sample,) for samples in chosen for sample in samples]
        if not groups:
            rule = f"keeps none of the rollouts of {config.path}"
            raise Refused(f"data.select={config.select}", rule, f"lower data.select_threshold={config.select_threshold}")
    check_vocabulary(groups, template, vocab_size)
    several = [group for group in groups if len(group) > 1]
    samples = [sample for group in groups for sample in group]
    return Rollouts(
        groups=tuple(groups),
        rows=len(rows),
        dropped=sum(not row.group for row in fitted) + not_selected,
        truncated=sum(row.truncated for row in fitted),
        rollouts=sum(len(row.rollouts) for row in rows),
        overlong=sum(row.overlong for row in fitted),
        unfinished=sum(row.unfinished for row in fitted),
        demonstrations=sum(sample.demonstration for sample in samples),
        singletons=len(groups) - len(several),
        equal=sum(len({sample.reward for sample in group}) == 1 for group in several),
        selected=None if config.select is None else len(groups),
        not_selected=not_selected,
        weight_versions=tuple(sorted({r.weight_version for row in rows for r in row.rollouts if r.weight_version is not None})),
    )


def check_selection(config: DataConfig) -> None:
    """Refuses options of selection that the one in use does not read."""
    if config.select != "rft":
        for key, value, default in (("select_threshold", config.select_threshold, 1.0), ("dedupe", config.dedupe, False)):
            if value != default:
                rule = f"is not read where data.select={config.select}"
                raise Refused(f"data.{key}={value}", rule, "use data.select=rft, or leave it out")


def choose(group: Group, config: DataConfig) -> list[Sample]:
    """The samples of a group that `select` keeps."""
    rewards = [sample.reward for sample in group]
    kept = rft(rewards, config.select_threshold) if config.select == "rft" else raft(rewards)
    if config.dedupe:
        kept = first_of_each(kept, [sample.token_ids.tobytes() for sample in group])
    return [sample for sample, flag in zip(group, kept, strict=True) if flag]


@dataclass(frozen=True)
class Fitted:
    """The samples of one row that fit."""

    group: Group
    overlong: int  # rollouts dropped
    truncated: int  # samples cut
    unfinished: int
    longest: int  # tokens


def fit_rows(rows: list[RecordedPrompt], config: DataConfig, template: ChatTemplate) -> Iterator[Fitted]:
    """Each row tokenised, and of its samples those that fit."""
    texts = [row for row in rows if is_text(row.prompt)]
    prompts = template.encode_prompts([row.prompt for row in texts], [row.source for row in texts], config.system_prompt)
    words = [r for row in rows for r in row.rollouts if isinstance(r.response, str)]
    responses = template.encode_responses([r.response for r in words], [r.source for r in words], [r.finished for r in words])
    shown = [] if config.select else [row for row in rows if row.demonstration is not None]
    demonstrations = template.encode_responses(
        [row.demonstration for row in shown], [f"{row.source}: demonstration" for row in shown]
    )
    with_logprobs = rows[0].rollouts[0].logprobs is not None
    for row in rows:
        prompt = next(prompts) if is_text(row.prompt) else row.prompt
        whole = []
        for rollout in row.rollouts:
            response = next(responses) if isinstance(rollout.response, str) else rollout.response
            check_response(rollout, response)
            whole.append(to_sample(prompt, response, rollout.source, False, rollout.reward, rollout.logprobs))
        if row.demonstration is not None and not config.select:
            response = next(demonstrations)
            logprobs = np.zeros(len(response), np.float32) if with_logprobs else None
            whole.append(to_sample(prompt, response, f"{row.source}: demonstration", True, row.demonstration_reward, logprobs))
        fitted = [fit(sample, len(prompt), config) for sample in whole]
        pairs = list(zip(whole, fitted, strict=True))
        yield Fitted(
            group=tuple(sample for sample in fitted if sample is not None),
            overlong=sum(after is None and not before.demonstration for before, after in pairs),
            truncated=sum(after is not None and len(after) < len(before) for before, after in pairs),
            unfinished=sum(after is not None and not r.finished for r, after in zip(row.rollouts, fitted, strict=False)),
            longest=max(map(len, whole)),
        )


def to_sample(
    prompt: list[int],
    response: list[int],
    source: str,
    demonstration: bool,
    reward: float,
    logprobs: np.ndarray | None,
    routed_experts: np.ndarray | None = None,
) -> Sample:
    """Prompt and response end to end.

    Args:
        routed_experts: [n - 1, MoE layers, K], of every token but the last, which no engine reads.
    """
    token_ids = np.array(prompt + response, dtype=np.int32)
    if logprobs is not None:
        logprobs = np.concatenate([np.zeros(len(prompt), np.float32), logprobs])
    if routed_experts is not None:
        routed_experts = np.pad(routed_experts.astype(np.int16), ((0, 1), (0, 0), (0, 0)), constant_values=-1)
    return Sample(
        token_ids=token_ids,
        loss_mask=np.arange(len(token_ids)) >= len(prompt),
        source=source,
        demonstration=demonstration,
        reward=reward,
        rollout_logprobs=logprobs,
        routed_experts=routed_experts,
    )


def fit(sample: Sample, prompt_length: int, config: DataConfig) -> Sample | None:
    """The sample, cut where it must be, or None where it is dropped."""
    length = fitting_length(len(sample), prompt_length, config, sample.source)
    if length is None or length == len(sample):
        return sample if length else None
    logprobs = sample.rollout_logprobs
    return dataclasses.replace(
        sample,
        token_ids=sample.token_ids[:length].copy(),  # a view would keep the whole in memory
        loss_mask=sample.loss_mask[:length].copy(),
        rollout_logprobs=None if logprobs is None else logprobs[:length].copy(),
    )


def check_response(rollout: Rollout, response: list[int]) -> None:
    """Refuses a response of no tokens, and log-probabilities that are not one for each of its tokens."""
    if not response:
        raise Refused(rollout.source, "has a response without tokens", "leave it out, or say finish_reason=stop")
    if rollout.logprobs is not None and len(rollout.logprobs) != len(response):
        rule = f"has {len(rollout.logprobs)} logprobs for {len(response)} response tokens"
        raise Refused(rollout.source, rule, "record token_ids beside them: words alone may be tokenised otherwise")


def check_token_ids(rows: list[RecordedPrompt], template: ChatTemplate, vocab_size: int) -> None:
    """Refuses recorded token ids that the embedding does not have, and prompts with an image in them."""
    for row in rows:
        if not is_text(row.prompt):
            template.check_text(row.prompt, row.source)
        given = [(row.source, row.prompt)] if not is_text(row.prompt) else []
        given += [(r.source, r.response) for r in row.rollouts if not isinstance(r.response, str)]
        for source, ids in given:
            if max(ids) >= vocab_size:
                rule = f"holds token {max(ids)}, and the embedding has {vocab_size} rows"
                raise Refused(source, rule, "record rollouts of the model in model.path, with its tokenizer")
