"""What every engine takes and gives: how to sample, what was sampled, and the two methods between which an engine lives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from megapsft.errors import Refused

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are sampled, by the field's names.

    With z the logits and p = softmax(z / temperature): a token can be drawn if fewer than `top_k` tokens are more probable, and
    if those have together less than `top_p` of the probability. Both cuts are of p itself, as in SGLang; of equally probable
    tokens, the lower ids count as the more probable. What is left is drawn in proportion to p.

    Raises:
        Refused: a value out of range, or of another type.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 leaves all
    top_k: int = -1  # -1 leaves all
    max_tokens: int  # of the response, the stop token included
    stop_token_ids: tuple[int, ...] = ()  # a response ends with the first of these, which belongs to it
    seed: int = 0  # the same seed, requests and weights give the same responses, where the engine can (inprocess)

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, "use 0 (greedy), 0.7 or 1.0")
        _number("top_p", self.top_p, "use 1.0 to leave all, or 0.95")
        for name in ("top_k", "max_tokens", "seed"):
            _integer(name, getattr(self, name))
        if self.temperature < 0:
            raise Refused(f"temperature={self.temperature}", "must be 0 or more", "use 0 (greedy), 0.7 or 1.0")
        if not 0 < self.top_p <= 1:
            raise Refused(f"top_p={self.top_p}", "must be above 0 and at most 1", "use 1.0 to leave all, or 0.95")
        if self.top_k != -1 and self.top_k < 1:
            raise Refused(f"top_k={self.top_k}", "must be 1 or more, or -1", "use -1 to leave all")
        if self.max_tokens < 1:
            raise Refused(f"max_tokens={self.max_tokens}", "must be 1 or more", "use max_tokens=1, or more")
        if not 0 <= self.seed < 2**63:
            raise Refused(f"seed={self.seed}", "must be from 0 to 2^63 - 1", "use seed=0")
        if not isinstance(self.stop_token_ids, tuple):
            raise Refused(f"stop_token_ids={self.stop_token_ids!r}", "must be a tuple of token ids", "use (2,) for one")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token)
            if token < 0:
                raise Refused(f"stop_token_ids={self.stop_token_ids}", "must not be negative", "use ids of the tokenizer")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One response as the engine made it: the ids that it saw and drew, never those of a text tokenised again."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # with the stop token that ended it
    # of each response token, nats: log softmax(z / temperature) over the full vocabulary, before top_k and top_p, as SGLang gives
    # them by default (SGLANG_RETURN_ORIGINAL_LOGPROB unset); where temperature is 0, those of temperature 1
    rollout_logprobs: tuple[float, ...]
    finish_reason: FinishReason  # abort: it is not finished, and a Request may go on from it
    weight_version: int  # of the weights that sampled it; the oldest, where they changed on the way
    routed_experts: np.ndarray | None = None  # [prompt + response - 1, MoE layers, K] int32, where the engine returns them


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response that is asked for."""

    prompt_ids: tuple[int, ...]
    number: int = 0  # among the responses to this prompt: it tells their seeds apart
    partial: Rollout | None = None  # an aborted response to this prompt, which is gone on with


class Engine(Protocol):
    """What responses are sampled by."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Callable[[int, Rollout], bool] | None = None
    ) -> list[Rollout]:
        """One rollout for each request, in their order.

        Args:
            enough: called with the index and the rollout of each request as it finishes, from one thread at a time; once it
                returns True the rest is aborted, and comes back as it stands. Engines in the training process refuse it.
        """

    def load_weights(self, stream: Iterable[tuple[str, Tensor | None]], version: int) -> None:
        """Sample from these weights henceforth.

        Args:
            stream: of the exporter: names of the Hugging Face checkpoint and their tensors.
            version: what rollouts from now on are marked with.
        """

    def close(self) -> None:
        """End what the engine started, and nothing else."""


def _number(name: str, value: float, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused(f"{name}={value!r}", "must be a finite number", remedy)


def _integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(f"{name}={value!r}", "must be an integer", "leave out quotes and decimals")


__all__ = ["Engine", "FinishReason", "Request", "Rollout", "Sampling"]
