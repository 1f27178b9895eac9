"""Several models on the same prompts and responses, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megapsft.config import Config, load_config
from megapsft.errors import Refused
from megapsft.platform.memory import free_models
from megapsft.policy.build import Policy
from megapsft.policy.head.ranks import label_ranks
from megapsft.policy.hidden import trained_hidden
from megapsft.policy.vocab_parallel import vocab_parallel_logprobs
from megapsft.train.compared import Folder, check_same_vocabulary, frozen_policy, open_folder, plan_of
from megapsft.train.comparison import Comparison, Seen
from megapsft.train.noise import Bench
from megapsft.train.plan import RunPlan, plan_run
from megapsft.types import Microbatch, VocabularyTerm

ROWS = 128  # of the data, where the user does not say how many
AT_ONCE = 32  # rows of a minibatch: what the bar of progress advances by
OBJECTIVES = {"demonstrations": "sft", "rollouts": "sft", "preferences": "dpo"}  # kind -> one that trains all of its responses
READ = ("data.", "model.", "parallel.", "fp8.", "train.temperature=")  # what a comparison asks of a config
KNOWN = "data.*, model.*, parallel.*, fp8.* and train.temperature"
OPTIONS = {"data.path=": "--data", "data.limit=": "--rows", "model.path=": "--base"}
CHANNELS = ("logprobs", "entropy", "ranks", "kl", "kl_of_base")


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """Checked: the same samples go through all of the models."""

    run: RunPlan  # of the base
    base: Folder
    tuned: tuple[Folder, ...]
    references: tuple[Folder, ...]

    @property
    def folders(self) -> tuple[Folder, ...]:
        return (self.base, *self.tuned, *self.references)

    @property
    def minibatches(self) -> int:
        """That go through all models together."""
        return len(self.folders) * -(-len(self.run.data.groups) // AT_ONCE)


def config_of(base: Path, data: Path, rows: int, overrides: Sequence[str]) -> Config:
    """That of a run which would train the base on the first `rows` of the data.

    Raises:
        Refused: an override that a comparison does not read.
    """
    for text in overrides:
        for key, option in OPTIONS.items():
            if text.startswith(key):
                raise Refused(text, f"is what {option} says", "leave it out")
        if not text.startswith(READ):
            raise Refused(text, "is not read by a comparison", f"it reads {KNOWN}")
    if rows < 1:
        raise Refused(f"--rows {rows}", "must be 1 or more", "leave it out")
    kind = load_config(None, overrides).data.kind
    if kind not in OBJECTIVES:
        rule = "has no responses to look at"
        raise Refused(f"data.kind={kind}", rule, "record some: megapsft rollout, then data.kind=rollouts")
    ours = [
        f"model.path={base}", f"data.path={data}", f"data.limit={rows}", f"objective.name={OBJECTIVES[kind]}",
        f"train.batch_size={AT_ONCE}", f"run.dir={base}/no-run",
    ]  # fmt: skip
    return load_config(None, [*overrides, *ours])


def plan_comparison(
    config: Config, world_size: int, tuned: Sequence[tuple[str | None, Path]], references: Sequence[tuple[str, Path]]
) -> ComparisonPlan:
    """Look at all models and the data; nothing is loaded.

    Args:
        config: as of `config_of`.
        tuned: (name or None, folder), at least one.

    Raises:
        Refused: whatever is wrong.
    """
    base = open_folder(Path(config.model.path))
    others = [[open_folder(path, name) for name, path in several] for several in (tuned, references)]
    check_same_vocabulary(base, others[0] + others[1])
    plan = ComparisonPlan(run=plan_run(config, world_size), base=base, tuned=tuple(others[0]), references=tuple(others[1]))
    for folder in plan.folders:
        plan_of(plan.run, folder)
    return plan


def compare_models(plan: ComparisonPlan, advance: Callable[[str], None] = lambda name: None) -> Comparison:
    """Collective. The same on every rank.

    Args:
        advance: called with the model's name when a minibatch has gone through it.

    Raises:
        Refused: a model gives numbers that are not finite.
    """
    bench = Bench(plan.run.data.groups, plan.run)
    base, kept = _measure(plan.run, plan.base, bench, advance, None)
    seen = [_measure(plan.run, folder, bench, advance, kept)[0] for folder in plan.folders[1:]]
    samples = plan.run.data.samples
    ids = np.concatenate([sample.token_ids[1:][sample.loss_mask[1:]] for sample in samples]).astype(np.int64)
    return Comparison(
        data=plan.run.config.data.path,
        sources=tuple(sample.source for sample in samples),
        lengths=tuple(int(sample.loss_mask[1:].sum()) for sample in samples),
        token_ids=ids,
        words={int(one): plan.run.template.spell([int(one)]) for one in np.unique(ids)},
        base=base,
        tuned=tuple(seen[: len(plan.tuned)]),
        references=tuple(seen[len(plan.tuned) :]),
    )


@dataclass(frozen=True)
class Kept:
    """What the base's probabilities can be made of again, on the host; on ranks without a head nothing."""

    hidden: list[list[Tensor]]  # [n, D] of each microbatch of each minibatch
    weight: Tensor | None  # [V / p, D]


@torch.no_grad()
def _measure(
    run: RunPlan, folder: Folder, bench: Bench, advance: Callable[[str], None], base: Kept | None
) -> tuple[Seen, Kept | None]:
    """Collective. One model; `base` is what was kept of the base, None of the base itself."""
    plan = plan_of(run, folder)
    policy = frozen_policy(plan, folder)
    weight, batch = policy.output_weight(), bench.batch(plan)
    base_weight = None if base is None or base.weight is None else base.weight.to(policy.device)
    found, hidden = [], []
    for number, minibatch in enumerate(batch.minibatches):
        read = trained_hidden(policy, minibatch)
        against = [None] * len(read) if base is None else base.hidden[number]
        pairs = zip(minibatch.microbatches, read, against, strict=False)
        found.append([_channels(policy, weight, base_weight, *pair) for pair in pairs])
        hidden.append([] if base is not None else [one.cpu() for one in read])
        advance(folder.name)
    channels = {
        name: bench.by_token(batch, [[place[number] for place in one] for one in found], policy).numpy()
        for number, name in enumerate(CHANNELS[: 3 if base is None else 5])
    }
    ranks = channels.pop("ranks").astype(np.int64)
    kept = Kept(hidden, None if weight is None else weight.detach().cpu()) if base is None else None
    del policy, weight
    free_models()
    return Seen(name=folder.name, path=str(folder.path), ranks=ranks, **channels), kept


def _channels(
    policy: Policy, weight: Tensor, base_weight: Tensor | None, microbatch: Microbatch, hidden: Tensor, base: Tensor | None
) -> Tensor:
    """CHANNELS, or the first three without a base: [C, B, S] fp64, 0 where nothing is trained."""
    head, there = policy.head(), microbatch.loss_mask.to(policy.device)
    place = torch.zeros(3 if base is None else 5, *there.shape, dtype=torch.float64, device=policy.device)
    if not len(hidden):
        return place
    labels = microbatch.labels.to(policy.device)[there]
    where = (hidden, weight, labels, head.tp_group, head.valid_vocab, head.chunk_bytes)
    options = {"temperature": policy.temperature, "entropy_gradient": False, "backend": head.backend}
    values: list[Tensor] = []
    if base is not None:
        of_base = {"ref_hidden": base.to(policy.device), "ref_weight": base_weight}
        for kind in ("reverse_kl", "forward_kl"):
            *own, kl = vocab_parallel_logprobs(*where, **options, **of_base, term=VocabularyTerm(kind=kind))
            values.append(kl)
    else:
        own = vocab_parallel_logprobs(*where, **options)
    place[:, there] = torch.stack([one.double() for one in (*own, label_ranks(*where), *values)])
    return place


__all__ = ["ROWS", "ComparisonPlan", "compare_models", "config_of", "plan_comparison"]
