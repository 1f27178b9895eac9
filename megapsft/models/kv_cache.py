"""Keys and values of sequences that grow: a model's attention, while a token at a time is generated.

A forward pass takes the new tokens of all sequences end to end as one row [1, T], whose rotary positions and attention are told
here, by sequence. Nothing else in a layer looks from one token to another, so Megatron needs no notion of a cache or of padding;
and outside of `KVCache.extended` no module is other than it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

GROWTH = 1.5  # of the room for tokens, when it is full


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One new token for every sequence: the same in all layers."""

    rows: Tensor  # [sequences] int64: 0, 1, ...
    lengths: Tensor  # [sequences] int64: where the new token goes
    longest: int  # with the new token
    seen: Tensor  # [sequences, 1, 1, longest] bool: which keys its query sees


class KVCache:
    """Of the layers of this rank, for a batch of sequences.

    Args:
        sequences: how many, all empty at first.
    """

    def __init__(self, sequences: int = 0):
        self.lengths = [0] * sequences
        self._counts: Sequence[int] = ()
        self._step: _Step | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values: [sequences, groups, room, d]

    @contextmanager
    def extended(self, models: Sequence[GPTModel], counts: Sequence[int], size: int) -> Iterator[Tensor]:
        """Let one forward pass of `models`, without gradient, append to the sequences.

        Args:
            counts: new tokens of each sequence: any number of an empty one, none of another; or 1 of every sequence.
            size: T of the pass; positions beyond the sum of `counts` are padding.

        Yields:
            [1, T] int64, the position of each token in its sequence.
        """
        positions = [start + new for start, count in zip(self.lengths, counts, strict=True) for new in range(count)]
        positions += [0] * (size - len(positions))
        device = next(models[0].parameters()).device
        positions = torch.tensor(positions, device=device)
        self._counts, self._step, replaced = counts, self._one_each(counts, device), []
        try:
            for model in models:
                rotary = model.rotary_pos_emb
                rotary.forward = partial(_rotary, _angles(positions, rotary.inv_freq))
                replaced.append(rotary)
                for layer in model.decoder.layers:
                    attention = layer.self_attention.core_attention
                    attention.forward = partial(self._attend, layer.layer_number, model.config.softmax_scale)
                    replaced.append(attention)
            yield positions[None]
        finally:
            for module in replaced:
                del module.forward  # the class's own again
        self.lengths = [start + count for start, count in zip(self.lengths, counts, strict=True)]

    def selected(self, sequences: Sequence[int]) -> KVCache:
        """Another cache, of these sequences in this order; one may come several times."""
        other = KVCache()
        other.lengths = [self.lengths[index] for index in sequences]
        for layer, (keys, values) in self._layers.items():
            index = torch.tensor(sequences, dtype=torch.int64, device=keys.device)
            other._layers[layer] = keys[index], values[index]
        return other

    def extend(self, other: KVCache) -> None:
        """Put the sequences of another behind these, and leave the other empty."""
        self.lengths, other.lengths = self.lengths + other.lengths, []
        for layer, theirs in other._layers.items():
            mine = self._layers.get(layer)
            self._layers[layer] = theirs if mine is None else tuple(map(_stacked, mine, theirs))
        other._layers = {}

    def _one_each(self, counts: Sequence[int], device: torch.device) -> _Step | None:
        if not counts or not all(count == 1 and length for count, length in zip(counts, self.lengths, strict=True)):
            return None
        lengths = torch.tensor(self.lengths, device=device)
        longest = max(self.lengths) + 1
        return _Step(
            rows=torch.arange(len(counts), device=device),
            lengths=lengths,
            longest=longest,
            seen=(torch.arange(longest, device=device) <= lengths[:, None])[:, None, None],
        )

    def _attend(self, layer: int, scale: float | None, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[T, 1, heads * d] of query [T, 1, heads, d] and key, value [T, 1, groups, d]."""
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        keys, values = self._room(layer, key)
        real = sum(self._counts)
        if self._step is not None:
            out = _attend_to_cache(self._step, *(x[:real] for x in (query, key, value)), keys, values, scale)
        else:
            outputs = []
            parts = zip(*(x[:real].split(list(self._counts)) for x in (query, key, value)), strict=True)
            for index, (q, k, v) in enumerate(parts):
                if len(q):
                    keys[index, :, : len(k)], values[index, :, : len(v)] = k.transpose(0, 1), v.transpose(0, 1)
                    outputs.append(_causal(q, k, v, scale))
            out = torch.cat([*outputs, query[:0]])
        if real < len(query):
            out = torch.cat([out, query.new_zeros(query[real:].shape)])
        return out.flatten(1).unsqueeze(1)

    def _room(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer with room for what comes; zeros where nothing is, as masked garbage is garbage still."""
        needed = max((start + count for start, count in zip(self.lengths, self._counts, strict=True)), default=0)
        held = self._layers.get(layer)
        room = 0 if held is None else held[0].shape[2]
        if held is None or needed > room:
            shape = len(self.lengths), like.shape[1], max(needed, int(room * GROWTH)), like.shape[2]
            fresh = like.new_zeros(shape), like.new_zeros(shape)
            for new, old in zip(fresh, held or (), strict=False):
                new[:, :, :room] = old
            self._layers[layer] = held = fresh
        return held


def _attend_to_cache(
    step: _Step, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scale: float | None
) -> Tensor:
    """[sequences, heads, d] of one new token a sequence, whose key and value are kept."""
    keys[step.rows, :, step.lengths], values[step.rows, :, step.lengths] = key, value
    # the heads of a group stand where the queries of a head usually do: keys and values need not be repeated
    grouped = query.unflatten(1, (key.shape[1], -1))
    mask = step.seen.expand(-1, 1, grouped.shape[2], -1)
    kept = (x[:, :, : step.longest] for x in (keys, values))
    return F.scaled_dot_product_attention(grouped, *kept, attn_mask=mask, scale=scale).flatten(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[S, heads, d] of one sequence that attends to itself."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)[0].transpose(0, 1)


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """[sequences of both, groups, the larger room, d], zeros where nothing is."""
    room = max(first.shape[2], second.shape[2])
    return torch.cat([F.pad(x, (0, 0, 0, room - x.shape[2])) for x in (first, second)])


def _angles(positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """[T, 1, 1, d] fp32, as Megatron's rotary embedding gives them for 0, 1, ..., T - 1."""
    inverse_frequencies = inverse_frequencies.to(positions.device)
    angles = torch.outer(positions.to(inverse_frequencies.dtype), inverse_frequencies)
    return torch.cat((angles, angles), dim=-1)[:, None, None]


def _rotary(angles: Tensor, *_: Any, **__: Any) -> Tensor:
    return angles


__all__ = ["KVCache"]
