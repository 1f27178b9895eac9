"""A run is one or two phases of steps: plain SFT to warm up, then the objective with a fresh optimizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megapsft.config import Config, OptimizerConfig
from megapsft.objectives.registry import build_objective
from megapsft.types import Objective


@dataclass(frozen=True, kw_only=True)
class Phase:
    name: str  # "warmup" or "train"
    objective_name: str
    objective: Objective
    optimizer: OptimizerConfig
    first_step: int
    steps: int
    critic_steps: int = 0  # the first of them, which train the critic alone

    @property
    def end(self) -> int:
        return self.first_step + self.steps

    @property
    def policy_from(self) -> int:
        """The first step that updates the policy."""
        return self.first_step + self.critic_steps

    @property
    def policy_steps(self) -> int:
        """Steps that update the policy."""
        return self.steps - self.critic_steps


def phases(config: Config) -> tuple[Phase, ...]:
    """The phases of the run, in order; a phase of no steps is left out.

    Raises:
        Refused: unknown objective or option.
    """
    train, warmup = config.train, []
    if train.sft_warmup_steps:
        constant = dataclasses.replace(
            config.optimizer, lr=train.sft_warmup_lr, lr_decay_style="constant", lr_warmup_steps=0, min_lr=0.0
        )
        sft = build_objective({"name": "sft"})
        warmup.append(
            Phase(
                name="warmup",
                objective_name="sft",
                objective=sft,
                optimizer=constant,
                first_step=0,
                steps=train.sft_warmup_steps,
            )
        )
    objective = Phase(
        name="train",
        objective_name=config.objective["name"],
        objective=build_objective(config.objective),
        optimizer=config.optimizer,
        first_step=train.sft_warmup_steps,
        steps=train.steps,
        critic_steps=config.critic.warmup_steps,
    )
    return (*warmup, objective)


def phase_of(all_phases: tuple[Phase, ...], step: int) -> Phase:
    """The phase that `step` belongs to."""
    return next(phase for phase in all_phases if step < phase.end)


def has_old_policy(objective: Objective) -> bool:
    """Whether it compares the policy with itself at the start of the step."""
    return bool(objective.needs & {"old_logprobs", "old_entropy"})


def first_old_pass(objective: Objective) -> int:
    """The first minibatch of a step that needs a pass of the old policy.

    That is the second: the training pass of the first *is* the old policy, bit for bit. Only where something must be counted from
    it beforehand the first has one too.
    """
    beforehand = bool((objective.totals_need or frozenset()) & {"old_logprobs", "old_entropy"})
    beforehand |= objective.advantages is not None and objective.advantages.kl_coef > 0
    return 0 if beforehand else 1


def reference_needs(objective: Objective) -> frozenset[str]:
    """What it, or the reward that it makes of a KL, reads of a frozen reference."""
    kl_in_reward = objective.advantages is not None and objective.advantages.kl_coef > 0
    return objective.needs & {"ref_logprobs", "ref_hidden"} | ({"ref_logprobs"} if kl_in_reward else frozenset())
