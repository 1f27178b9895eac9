"""The policy generates by itself: an engine without a server, under the policy's own tensor, sequence, pipeline and expert split.

One forward pass a token, over all responses that are not finished; keys and values are kept (megapsft/models/kv_cache.py), a
prompt goes through the model once, whatever the number of its responses, and a response that ends makes room for the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megapsft.errors import Refused
from megapsft.models.kv_cache import KVCache
from megapsft.policy.build import Policy, without_fp8
from megapsft.policy.draw import draw, sample_key
from megapsft.rollout.base import FinishReason, Request, Rollout, Sampling

REASONS: tuple[FinishReason, ...] = ("stop", "length")
ROOM = 4  # responses are taken in when 1 / ROOM of max_batch_size is free: each time costs a pass


@dataclass(kw_only=True, eq=False)
class _Response:
    """One response on its way."""

    context: tuple[int, ...]  # what goes through the model as one: the prompt, and what there was of the response
    key: int
    tokens: list[int]
    logprobs: list[float]
    weight_version: int
    finish_reason: FinishReason | None = None


class InProcess:
    """The engine whose weights are the policy's.

    All ranks of the world call `generate` together, with the same requests; each tensor x pipeline group samples its share, and
    all get all rollouts. Where experts are spread over such groups, they go through the model in step.

    A response depends on the weights, the sampling options, its prompt and its number: on no other request and not on the split,
    up to the rounding of products of other shapes.

    Args:
        max_batch_size: responses at once in each group, which bounds the cache.
        max_prefill_tokens: of prompts that go through the model as one; a longer prompt goes alone.
    """

    def __init__(self, policy: Policy, *, max_batch_size: int = 64, max_prefill_tokens: int = 8192):
        for name, value in (("max_batch_size", max_batch_size), ("max_prefill_tokens", max_prefill_tokens)):
            if value < 1:
                raise Refused(f"{name}={value}", "must be 1 or more", f"use {name}=64")
        self.policy, self.max_batch_size, self.max_prefill_tokens = policy, max_batch_size, max_prefill_tokens
        self.weight_version = 0

    def load_weights(self, stream: Iterable[tuple[str, Tensor | None]], version: int) -> None:
        """Mark rollouts with `version`; `stream` is not read, as its weights are here already."""
        self.weight_version = version

    def close(self) -> None:
        """Nothing was started."""

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Callable[[int, Rollout], bool] | None = None
    ) -> list[Rollout]:
        """One rollout for each request, in their order, on every rank. Collective over the world; the model is left as it was.

        Raises:
            Refused: `enough`; a prompt that is empty, has ids beyond the vocabulary, or leaves no room for `max_tokens` within
                max_position_embeddings; a stop token beyond the vocabulary; a partial rollout that is of another prompt, is
                finished, or has `max_tokens` already.
        """
        if enough is not None:
            raise Refused("enough", "would have to be called alike on all ranks of the policy", "use rollout.engine=sglang")
        self._check(requests, sampling)
        responses = [self._response(request, sampling) for request in self._share(requests)]
        order = {context: place for place, context in enumerate(dict.fromkeys(r.context for r in responses))}
        batch = _Batch(self, sampling, sorted(responses, key=lambda response: order[response.context]))
        with _sampling(self.policy), without_fp8(self.policy.config):  # a token at a time is no shape for FP8
            while batch.waiting or batch.active:
                batch.advance()
            while size := self._size(0):  # others are not done yet
                self._forward(KVCache(), [], size)
        return self._everyones(requests, responses)

    def _forward(self, cache: KVCache, tokens: Sequence[Sequence[int]], size: int) -> Tensor | None:
        """Append tokens to the sequences of a cache: one pass over the pipeline, of `size` positions.

        Returns:
            Of each sequence with tokens, the hidden state behind the last one, [sequences, D]; None but on the last stage.
        """
        policy, counts = self.policy, list(map(len, tokens))
        ids = [token for sequence in tokens for token in sequence]
        ids = torch.tensor(ids + [0] * (size - len(ids)), device=policy.device)[None]
        models, stages = policy.gpt_models(), policy.mesh.pp * policy.mesh.vpp
        rank = parallel_state.get_pipeline_model_parallel_rank()
        with cache.extended(models, counts, size) as positions:
            for number, chunk in enumerate(policy.chunks):
                stage = number * policy.mesh.pp + rank
                if stage > 0:
                    models[number].set_input_tensor(self._receive(size))
                hidden = chunk(ids, positions, None)
                if stage < stages - 1:
                    self._send(hidden)
        if not models[-1].post_process:
            return None
        hidden = hidden.transpose(0, 1).contiguous()  # [T (/ tp), 1, D]
        if policy.mesh.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=parallel_state.get_tensor_model_parallel_group())
        ends = torch.tensor(counts, dtype=torch.int64).cumsum(0)[[index for index, count in enumerate(counts) if count]]
        return hidden[:, 0][ends.to(hidden.device) - 1]

    def _size(self, tokens: int) -> int:
        """Positions of the next pass: the most that a rank brings where experts are shared, 0 where nobody brings any."""
        if self.policy.mesh.ep > 1:
            most = torch.tensor(tokens, device=self.policy.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            tokens = int(most)
        unit = self.policy.mesh.tp if self.policy.mesh.sequence_parallel else 1
        return -(-tokens // unit) * unit

    def _append(self, responses: Sequence[_Response], last: Tensor | None, sampling: Sampling) -> None:
        """One more token for each response, of the hidden states [responses, D]: the last stage draws, all others are told."""
        drawn = torch.empty((2, len(responses)), dtype=torch.float64, device=self.policy.device)
        if last is not None:
            of_each = [[response.key for response in responses], [len(response.tokens) for response in responses]]
            keys, positions = torch.tensor(of_each, device=self.policy.device)
            logits, first = self._logits(last)
            drawn[0], drawn[1] = draw(logits, first, parallel_state.get_tensor_model_parallel_group(), sampling, keys, positions)
        if self.policy.mesh.pp > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(drawn, source, group=parallel_state.get_pipeline_model_parallel_group())
        for response, token, logprob in zip(responses, *drawn.tolist(), strict=True):
            response.tokens.append(int(token))
            response.logprobs.append(logprob)
            if token in sampling.stop_token_ids:
                response.finish_reason = "stop"
            elif len(response.tokens) == sampling.max_tokens:
                response.finish_reason = "length"

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        vocabulary, longest = self.policy.hf.vocab_size, self.policy.hf.max_position_embeddings
        for index, request in enumerate(requests):
            prompt, partial = request.prompt_ids, request.partial
            if len(prompt) == 0:
                raise Refused(f"prompt {index}", "is empty, and the first token needs one to follow", "give it a token")
            if len(prompt) + sampling.max_tokens > longest:
                raise Refused(
                    f"prompt {index} of {len(prompt)} tokens with max_tokens={sampling.max_tokens}",
                    f"exceeds max_position_embeddings={longest}",
                    f"use a prompt of {max(0, longest - sampling.max_tokens)} tokens or fewer, or a smaller max_tokens",
                )
            if partial is not None:
                _check_partial(index, request, partial, sampling)
            for token in (*prompt, *(partial.response_ids if partial else ())):
                if not isinstance(token, Integral) or not 0 <= token < vocabulary:
                    raise Refused(f"prompt {index}: token {token!r}", f"is not in 0 to {vocabulary - 1}", "use its tokenizer")
        for token in sampling.stop_token_ids:
            if token >= vocabulary:
                raise Refused(f"stop_token_ids: {token}", f"is not in 0 to {vocabulary - 1}", "use the model's tokenizer")

    def _response(self, request: Request, sampling: Sampling) -> _Response:
        partial = request.partial
        return _Response(
            context=request.prompt_ids + (partial.response_ids if partial else ()),
            key=sample_key(sampling.seed, request.prompt_ids, request.number),
            tokens=list(partial.response_ids) if partial else [],
            logprobs=list(partial.rollout_logprobs) if partial else [],
            weight_version=min(partial.weight_version, self.weight_version) if partial else self.weight_version,
        )

    def _share(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Those of this tensor x pipeline group: as many as others, neighbours, which often have the same prompt."""
        groups = self.policy.mesh.dp * self.policy.mesh.cp
        rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return requests[len(requests) * rank // groups : len(requests) * (rank + 1) // groups]

    def _everyones(self, requests: Sequence[Request], responses: Sequence[_Response]) -> list[Rollout]:
        """The rollouts of all groups, in the order of the requests."""
        mine = (
            np.array([len(response.tokens) for response in responses], dtype=np.int64),
            np.array([token for response in responses for token in response.tokens], dtype=np.int32),
            np.array([logprob for response in responses for logprob in response.logprobs], dtype=np.float64),
            np.array([REASONS.index(response.finish_reason) for response in responses], dtype=np.int8),
            np.array([response.weight_version for response in responses], dtype=np.int64),
        )
        parts = [mine]
        if self.policy.mesh.dp * self.policy.mesh.cp > 1:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            parts = [None] * group.size()
            dist.all_gather_object(parts, mine, group=group)
        lengths, tokens, logprobs, reasons, versions = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        ends = lengths.cumsum()
        return [
            Rollout(
                prompt_ids=request.prompt_ids,
                response_ids=tuple(tokens[end - length : end].tolist()),
                rollout_logprobs=tuple(logprobs[end - length : end].tolist()),
                finish_reason=REASONS[reason],
                weight_version=int(version),
            )
            for request, length, end, reason, version in zip(requests, lengths, ends, reasons, versions, strict=True)
        ]

    def _logits(self, hidden: Tensor) -> tuple[Tensor, int]:
        """[B, V / p] fp32 (fp64 for fp64 models), -inf on padding; and the first column's place in the vocabulary."""
        gpt = self.policy.gpt_models()[-1]
        tied = gpt.share_embeddings_and_output_weights
        weight = gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight
        logits = (hidden.to(weight.dtype) @ weight.T).to(torch.promote_types(weight.dtype, torch.float32))
        first = parallel_state.get_tensor_model_parallel_rank() * len(weight)
        logits[:, max(0, self.policy.hf.vocab_size - first) :] = -torch.inf
        return logits, first

    def _receive(self, size: int) -> Tensor:
        config, mesh = self.policy.config, self.policy.mesh
        shape = (size // mesh.tp if mesh.sequence_parallel else size, 1, config.hidden_size)
        hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=self.policy.device)
        source = parallel_state.get_pipeline_model_parallel_prev_rank()
        dist.recv(hidden, source, group=parallel_state.get_pipeline_model_parallel_group())
        return hidden

    def _send(self, hidden: Tensor) -> None:
        target = parallel_state.get_pipeline_model_parallel_next_rank()
        dist.send(hidden.contiguous(), target, group=parallel_state.get_pipeline_model_parallel_group())


@dataclass(kw_only=True, eq=False)
class _Prompts:
    """Contexts that have been through the model."""

    contexts: list[tuple[int, ...]]
    cache: KVCache
    last: Tensor | None  # [contexts, D], the hidden state behind each; None but on the last stage

    def select(self, places: list[int]) -> _Prompts:
        """These, with a cache of their own."""
        last = None if self.last is None else self.last[places]
        return _Prompts(contexts=[self.contexts[place] for place in places], cache=self.cache.selected(places), last=last)


class _Batch:
    """The responses of one group on their way: some go through the model, the others wait.

    Args:
        waiting: those of the same context beside each other.
    """

    def __init__(self, engine: InProcess, sampling: Sampling, waiting: Sequence[_Response]):
        self.engine, self.sampling = engine, sampling
        self.waiting, self.active, self.cache = deque(waiting), [], KVCache()
        self.held: _Prompts | None = None  # of the context in whose midst the batch was full

    def advance(self) -> None:
        """One more token for all that are active; or for as many as there is room for, their first."""
        room = self.engine.max_batch_size - len(self.active)
        if self.waiting and (not self.active or room * ROOM >= self.engine.max_batch_size):
            self._take_in([self.waiting.popleft() for _ in range(min(room, len(self.waiting)))])
        else:
            tokens = [response.tokens[-1:] for response in self.active]
            last = self.engine._forward(self.cache, tokens, self.engine._size(len(tokens)))
            self.engine._append(self.active, last, self.sampling)
        going = [index for index, response in enumerate(self.active) if response.finish_reason is None]
        if len(going) < len(self.active):
            self.cache = self.cache.selected(going)
            self.active = [self.active[index] for index in going]

    def _take_in(self, responses: list[_Response]) -> None:
        contexts = list(dict.fromkeys(response.context for response in responses))
        prompts = self._prompts(contexts)
        place = {context: place for place, context in enumerate(contexts)}
        each = prompts.select([place[response.context] for response in responses])
        unfinished = self.waiting and self.waiting[0].context == contexts[-1]
        self.held = prompts.select([len(contexts) - 1]) if unfinished else None
        self.engine._append(responses, each.last, self.sampling)
        self.cache.extend(each.cache)
        self.active += responses

    def _prompts(self, contexts: list[tuple[int, ...]]) -> _Prompts:
        """All contexts; the first may be held."""
        held = self.held if self.held is not None and self.held.contexts == contexts[:1] else None
        missing = contexts if held is None else contexts[1:]
        cache, last = KVCache(len(missing)), [] if held is None else [held.last]
        for part in _parts(list(map(len, missing)), self.engine.max_prefill_tokens):
            tokens = [context if place in part else () for place, context in enumerate(missing)]
            last.append(self.engine._forward(cache, tokens, self.engine._size(sum(map(len, tokens)))))
        if held is not None:
            held.cache.extend(cache)
            cache = held.cache
        return _Prompts(contexts=contexts, cache=cache, last=None if last[0] is None else torch.cat(last))


@contextmanager
def _sampling(policy: Policy) -> Iterator[None]:
    """Without dropout, and with an output layer that passes through what it would read: logits are wanted of few positions."""
    training = [module for chunk in policy.chunks for module in chunk.modules() if module.training]
    head = policy.head()
    request = None if head is None else head.request
    try:
        for chunk in policy.chunks:
            chunk.eval()
        if head is not None:
            head.request = "hidden"
        yield
    finally:
        for module in training:
            module.training = True
        if head is not None:
            head.request = request


def _check_partial(index: int, request: Request, partial: Rollout, sampling: Sampling) -> None:
    if partial.prompt_ids != request.prompt_ids:
        raise Refused(f"partial rollout {index}", "is of another prompt", "go on from a response to the same token ids")
    if partial.finish_reason != "abort":
        raise Refused(f"partial rollout {index}", f"is finished ({partial.finish_reason})", "leave its request out")
    if len(partial.response_ids) >= sampling.max_tokens:
        raise Refused(
            f"partial rollout {index} of {len(partial.response_ids)} tokens",
            f"leaves none of max_tokens={sampling.max_tokens}",
            f"use max_tokens={len(partial.response_ids) + 1}, or more",
        )


def _parts(lengths: Sequence[int], most: int) -> Iterator[range]:
    """Cut a row of prompts into runs of at most `most` tokens, of one prompt at least."""
    start, total = 0, 0
    for index, length in enumerate(lengths):
        if index > start and total + length > most:
            yield range(start, index)
            start, total = index, 0
        total += length
    if lengths:
        yield range(start, len(lengths))


__all__ = ["InProcess"]
