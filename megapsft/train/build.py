"""Models of a run, from its plan: the policy, the reference that is frozen, the critic."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megapsft.checkpoint.dist import load_model
from megapsft.checkpoint.hf import import_hf, init_adapters
from megapsft.policy.build import Policy, build_chunks, distribute, half, transformer_config
from megapsft.policy.critic import with_value_heads
from megapsft.policy.lora import with_adapters
from megapsft.policy.reference import Copied, Reference, Swapped
from megapsft.train.critic import Critic
from megapsft.train.optimizer import build_optimizer
from megapsft.train.plan import RunPlan, checkpoint_folder


def build_policy(plan: RunPlan) -> Policy:
    """Collective. The policy with the weights of the Hugging Face folder, wrapped for training."""
    config = plan.config
    megatron = transformer_config(plan.family, plan.hf, config.model, config.parallel, plan.mesh, config.fp8)
    chunks = build_chunks(megatron, plan.hf, config.model, plan.mesh)
    with_adapters(chunks, config.lora)
    import_hf(chunks, Path(config.model.path), plan.hf)
    init_adapters(chunks, plan.hf, config.lora, config.train.seed)
    return policy_of(plan, distribute(chunks, megatron, config.parallel), megatron)


def build_reference(plan: RunPlan, policy: Policy, first_step: int = 0) -> Reference:
    """Collective. The frozen reference; `policy` is as it was, but for what it lends itself to in between.

    Args:
        first_step: of the phase, where the policy has gone on since then: the weights are read from the checkpoint of that step
            (the warm-up's last), or where there was none before it from `model.path`.
    """
    config = plan.config
    reference: Reference = Swapped()
    if config.reference.placement == "copy":
        megatron = transformer_config(plan.family, plan.hf, config.model, config.parallel, plan.mesh, config.fp8)
        chunks = build_chunks(megatron, plan.hf, config.model, plan.mesh)
        with_adapters(chunks, config.lora)
        reference = Copied(policy_of(plan, half(chunks, megatron), megatron))
    mine = Swapped()
    if config.reference.path is not None:
        mine.take(policy)
        import_hf(policy.chunks, Path(config.reference.path), plan.hf)
    elif first_step:
        load_model(checkpoint_folder(config) / f"step-{first_step:08d}", policy.gpt_models())
    reference.take(policy)
    if config.reference.path is not None:
        mine.give_back(policy)
    return reference


def policy_of(plan: RunPlan, chunks: list[torch.nn.Module], megatron: TransformerConfig) -> Policy:
    """The chunks with what is known about them."""
    return Policy(
        chunks=chunks,
        config=megatron,
        family=plan.family,
        hf=plan.hf,
        source=Path(plan.config.model.path),
        mesh=plan.mesh,
        temperature=plan.config.train.temperature,
        routing_replay=plan.config.model.moe_routing_replay is True,  # those of rollouts come with their samples
        no_grad_microbatches=plan.config.train.no_grad_microbatches,
    )


def build_critic(plan: RunPlan) -> Critic:
    """Collective. The value function, with the weights of `critic.path` or `model.path` under a head of zeros."""
    config = plan.config
    megatron = transformer_config(plan.family, plan.hf, config.model, config.parallel, plan.mesh, config.fp8)
    chunks = build_chunks(megatron, plan.hf, config.model, plan.mesh)
    import_hf(chunks, Path(config.critic.path or config.model.path), plan.hf)
    with_value_heads(chunks, megatron)
    policy = policy_of(plan, distribute(chunks, megatron, config.parallel), megatron)
    options = dataclasses.replace(config.optimizer, lr=config.critic.lr, weight_decay=config.critic.weight_decay)
    return Critic(policy, build_optimizer(options, config.parallel, policy), config.critic.lr)


__all__ = ["build_critic", "build_policy", "build_reference", "policy_of"]
