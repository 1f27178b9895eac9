"""The modules of a layer."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

LARGEST = 448.0  # of float8_e4m3fn


class _Stateful(torch.nn.Module):
    """Keeps the largest values of earlier passes where scales are delayed, and pickles them as Transformer Engine does."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = False
        self.history: Tensor | None = None  # [amax_history_len, operands]

    def init_fp8_metadata(self, num_gemms: int = 1) -> None: ...

    def get_extra_state(self) -> Tensor:
        if self.history is None:
            return torch.empty(0, dtype=torch.uint8)
        state = {"recipe": self.fp8_meta["recipe"], "amax_history_fwd": self.history, "extra_fp8_variables": {}}
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is None or state.numel() == 0:
            return
        if os.environ.get("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE") != "1":
            raise RuntimeError("refusing to load pickled extra state")
        state = pickle.loads(state.numpy().tobytes())
        self.history, self.fp8_meta["recipe"] = state["amax_history_fwd"], state["recipe"]

    def _rounded(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The operands as products see them."""
        recipe = FP8GlobalStateManager.recipe
        self.fp8 = recipe is not None
        if recipe is None:
            return list(operands)
        for tensor in operands:
            if math.prod(tensor.shape[:-1]) % 8 or tensor.shape[-1] % 16:
                raise ValueError(f"FP8 execution requires dimensions divisible by 8 and 16, but got {list(tensor.shape)}")
        largest = torch.stack([F.pad(tensor.detach().abs().float().flatten(), (0, 1)).amax() for tensor in operands])
        if isinstance(recipe, DelayedScaling):
            self.fp8_meta["recipe"] = recipe
            if self.history is None:
                self.history = torch.zeros(recipe.amax_history_len, len(operands))
            seen = self.history.amax(0) if recipe.amax_compute_algo == "max" else self.history[0]
            self.history = torch.cat([largest[None], self.history[:-1]])
            largest = torch.where(seen > 0, seen, LARGEST)
        return [_to_fp8(tensor, amax) for tensor, amax in zip(operands, largest, strict=True)]


def _to_fp8(tensor: Tensor, largest: Tensor) -> Tensor:
    scale = LARGEST / largest.clamp(min=1e-12)
    rounded = (tensor.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() / scale
    return tensor + (rounded.to(tensor.dtype) - tensor).detach()  # gradients pass through


class _Product(torch.autograd.Function):
    """x W^T; the weight's gradient is added to `main_grad` in fp32 where asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, parameter: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter = parameter
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        to_x = gradient @ weight
        to_weight = gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()
        if ctx.parameter is None:
            return to_x, to_weight.to(weight.dtype), None
        ctx.parameter.main_grad.add_(to_weight)
        ctx.parameter.grad_added_to_main_grad = True
        return to_x, torch.zeros_like(weight), None


class _Weighted(_Stateful):
    def __init__(self, fuse_wgrad_accumulation: bool, params_dtype: torch.dtype):
        super().__init__()
        self.fuse_wgrad_accumulation, self.dtype = fuse_wgrad_accumulation, params_dtype

    def _weight(self, name: str, rows: int, columns: int, init: Callable | None) -> None:
        weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=self.dtype))
        if init is not None:
            init(weight)
        self.register_parameter(name, weight)

    def _bias(self, rows: int) -> None:
        """A parameter; of no rows an empty tensor that is none, and not None."""
        zeros = torch.zeros(rows, dtype=self.dtype)
        self.bias = torch.nn.Parameter(zeros) if rows else zeros

    def _product(self, x: Tensor, weight: torch.nn.Parameter) -> Tensor:
        rounded = self._rounded([x, weight])
        return _Product.apply(*rounded, weight if self.fuse_wgrad_accumulation and torch.is_grad_enabled() else None)


class Linear(_Weighted):
    def __init__(
        self, in_features: int, out_features: int, *, sequence_parallel: bool, fuse_wgrad_accumulation: bool, tp_group: Any,
        tp_size: int, get_rng_state_tracker: Any, init_method: Callable, bias: bool, return_bias: bool, parallel_mode: str | None,
        params_dtype: torch.dtype, device: Any, ub_name: str | None = None, rng_tracker_name: str | None = None,
    ):  # fmt: skip
        super().__init__(fuse_wgrad_accumulation, params_dtype)
        assert tp_size == 1
        self.in_features, self.out_features, self.use_bias, self.return_bias = in_features, out_features, bias, return_bias
        self.parallel_mode, self.tp_size, self.save_original_input = parallel_mode, tp_size, False
        self._weight("weight", out_features, in_features, init_method)
        self._bias(out_features if bias else 0)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        out = self._product(x, self.weight)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out


class LayerNormLinear(_Weighted):
    def __init__(
        self, in_features: int, out_features: int, *, eps: float, sequence_parallel: bool, fuse_wgrad_accumulation: bool,
        tp_group: Any, tp_size: int, get_rng_state_tracker: Any, init_method: Callable, bias: bool, return_bias: bool,
        parallel_mode: str, return_layernorm_output: bool, zero_centered_gamma: bool, normalization: str,
        params_dtype: torch.dtype, device: Any, ub_name: str | None = None,
    ):  # fmt: skip
        super().__init__(fuse_wgrad_accumulation, params_dtype)
        assert tp_size == 1
        assert normalization == "RMSNorm"
        assert not zero_centered_gamma
        assert not return_layernorm_output
        self.in_features, self.out_features, self.use_bias, self.return_bias = in_features, out_features, bias, return_bias
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype))
        self._weight("weight", out_features, in_features, init_method)
        self._bias(out_features if bias else 0)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        out = self._product(F.rms_norm(x, (self.in_features,), self.layer_norm_weight, self.eps), self.weight)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out


class GroupedLinear(_Weighted):
    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, *, sequence_parallel: bool, fuse_wgrad_accumulation: bool,
        tp_group: Any, tp_size: int, get_rng_state_tracker: Any, init_method: Callable, bias: bool, return_bias: bool,
        parallel_mode: str | None, params_dtype: torch.dtype, device: Any, ub_name: str | None = None,
        rng_tracker_name: str | None = None,
    ):  # fmt: skip
        super().__init__(fuse_wgrad_accumulation, params_dtype)
        assert tp_size == 1
        assert not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        for number in range(num_gemms):
            self._weight(f"weight{number}", out_features, in_features, init_method)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)  # scales of experts are not delayed here over a checkpoint

    def forward(self, x: Tensor, m_splits: Sequence[int], is_first_microbatch: bool | None = None) -> Tensor:
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        parts = x.split(list(m_splits))
        return torch.cat([self._product(part, weight) for part, weight in zip(parts, weights, strict=True)])


class RMSNorm(_Stateful):
    def __init__(
        self, normalized_shape: int | None = None, *, hidden_size: int | None = None, eps: float, sequence_parallel: bool,
        zero_centered_gamma: bool, params_dtype: torch.dtype, device: Any,
    ):  # fmt: skip
        super().__init__()
        assert not zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm:
    """No family has one."""


class DotProductAttention(_Stateful):
    def __init__(self, num_attention_heads: int, kv_channels: int, *, num_gqa_groups: int, attention_type: str,
                 attention_dropout: float, attn_mask_type: str, softmax_scale: float | None, layer_number: int,
                 **parallel: Any):  # fmt: skip
        super().__init__()
        assert attention_dropout == 0
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *, attn_mask_type: str,
        qkv_format: str = "sbhd", cu_seqlens_q: Tensor | None = None, cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None, cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_kv: int | None = None, pad_between_seqs: bool | None = None,
    ) -> Tensor:  # fmt: skip
        if qkv_format == "thd":
            assert attn_mask_type == "padding_causal"
            assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
            # there is no padding between sequences only where these are the same object, and only then any kernel will do
            assert not pad_between_seqs
            assert cu_seqlens_q_padded is cu_seqlens_q
            assert cu_seqlens_kv_padded is cu_seqlens_kv
            lengths = cu_seqlens_q.diff().tolist()
            assert max(lengths) == max_seqlen_q == max_seqlen_kv
            parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
            return torch.cat([self._attend(*(x[:, None] for x in part))[:, 0] for part in parts])
        assert attn_mask_type == "causal"
        return self._attend(query, key, value)

    def _attend(self, *tensors: Tensor) -> Tensor:
        """[S, B, heads * d] of [S, B, heads, d]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in tensors)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class Fp8Padding(torch.nn.Module):
    """Rows of zeros behind those of each expert."""

    def __init__(self, num_gemms: int, align_size: int | None = None):
        super().__init__()

    def forward(self, x: Tensor, m_splits: Sequence[int]) -> tuple[Tensor, list[int]]:
        wanted = [-(-rows // 16) * 16 for rows in m_splits]
        parts = zip(x.split(list(m_splits)), wanted, strict=True)
        return torch.cat([F.pad(part, (0, 0, 0, rows - len(part))) for part, rows in parts]), wanted


class Fp8Unpadding(Fp8Padding):
    def forward(self, x: Tensor, m_splits: Sequence[int]) -> Tensor:
        parts = x.split([-(-rows // 16) * 16 for rows in m_splits])
        return torch.cat([part[:rows] for part, rows in zip(parts, m_splits, strict=True)])
