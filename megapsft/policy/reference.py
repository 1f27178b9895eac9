"""The frozen reference policy, in the process of the policy: a second copy on the device, or parameters kept aside and swapped.

    copy   a second model beside the first: no time, its weights once more in device memory
    swap   the weights in host memory, exchanged with the policy's for each pass: no device memory, but time to copy them

Where adapters are trained, only they are kept and exchanged: what they are beside is the policy's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megapsft.policy.build import Policy, unwrap
from megapsft.policy.gather import gather_stale

Placement = Literal["swap", "copy"]


class Reference(Protocol):
    """A policy that stays as it was when it was taken."""

    def take(self, policy: Policy) -> None:
        """Become what `policy` is now."""

    def in_place_of(self, policy: Policy) -> contextlib.AbstractContextManager[Policy]:
        """A policy with the reference's weights, to be evaluated inside of the context."""

    def output_weight(self, policy: Policy) -> Tensor | None:
        """[V / p, D] of the output layer, on the device; None where this pipeline stage has none."""


class Swapped:
    """Weights kept in host memory."""

    def __init__(self) -> None:
        self._aside: list[Tensor] = []

    @torch.no_grad()
    def take(self, policy: Policy) -> None:
        gather_stale(policy.chunks)
        pin = torch.cuda.is_available()
        self._aside = [_host(parameter, pin) for parameter in _trained(policy.gpt_models())]

    @torch.no_grad()
    def give_back(self, policy: Policy) -> None:
        """Make `policy` what it was when it was taken."""
        for parameter, aside in zip(_trained(policy.gpt_models()), self._aside, strict=True):
            parameter.copy_(aside)

    @contextlib.contextmanager
    def in_place_of(self, policy: Policy) -> Iterator[Policy]:
        self._exchange(policy)
        try:
            yield policy
        finally:
            self._exchange(policy)

    def output_weight(self, policy: Policy) -> Tensor | None:
        weight = policy.output_weight()
        kept = zip(_trained(policy.gpt_models()), self._aside, strict=True)
        return next((aside.to(weight.device) for parameter, aside in kept if parameter is weight), weight)

    @torch.no_grad()
    def _exchange(self, policy: Policy) -> None:
        for parameter, aside in zip(_trained(policy.gpt_models()), self._aside, strict=True):
            mine = parameter.detach().to(aside.device, copy=True)
            parameter.copy_(aside)
            aside.copy_(mine)


class Copied:
    """A second model.

    Args:
        frozen: built like the policy, without data-parallel wrappers.
    """

    def __init__(self, frozen: Policy):
        self.frozen = frozen
        for parameter in _parameters(frozen.gpt_models()):
            parameter.requires_grad_(False)

    @torch.no_grad()
    def take(self, policy: Policy) -> None:
        gather_stale(policy.chunks)
        pairs = zip(_parameters(self.frozen.gpt_models()), _parameters(policy.gpt_models()), strict=True)
        for mine, theirs in pairs:
            mine.copy_(theirs)

    @contextlib.contextmanager
    def in_place_of(self, policy: Policy) -> Iterator[Policy]:
        yield self.frozen

    def output_weight(self, policy: Policy) -> Tensor | None:
        return self.frozen.output_weight()


def _parameters(models: Sequence[GPTModel]) -> list[torch.nn.Parameter]:
    return [parameter for model in models for parameter in unwrap(model).parameters()]


def _trained(models: Sequence[GPTModel]) -> list[torch.nn.Parameter]:
    return [parameter for parameter in _parameters(models) if parameter.requires_grad]


def _host(parameter: Tensor, pin: bool) -> Tensor:
    copy = parameter.detach().to("cpu", copy=True)
    return copy.pin_memory() if pin else copy
