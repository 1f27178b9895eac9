"""How large everything is: the whole, and the form for CI."""

from __future__ import annotations

from dataclasses import dataclass

from evidence.tasks import Amounts


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What `methods.table` makes its runs of."""

    amounts: Amounts
    seeds: tuple[int, ...]  # of models, orders of rows, and samples; learning rates are tuned at the first
    rates: int  # learning rates that are tried for each method: the middle ones of those that there are
    pretrain_steps: int
    steps: int  # of fine-tuning; an eighth, a quarter and a half of them are the warm-ups
    batch: int  # demonstrations of a step; the old policy of PSFT is refreshed once a step
    minibatch: int  # demonstrations of an update
    rl_steps: int
    rl_prompts: int  # of a step, each with 8 responses
    dpo_steps: int


FULL = Sizes(
    amounts=Amounts(pretrain=8000, demonstrations=128, problems=200),
    seeds=(1, 2, 3, 4, 5), rates=3, pretrain_steps=330, steps=80, batch=64, minibatch=8, rl_steps=30, rl_prompts=16, dpo_steps=8,
)  # fmt: skip
CI = Sizes(
    amounts=Amounts(pretrain=128, demonstrations=32, problems=3),
    seeds=(1, 2), rates=1, pretrain_steps=2, steps=4, batch=8, minibatch=2, rl_steps=1, rl_prompts=2, dpo_steps=1,
)  # fmt: skip
