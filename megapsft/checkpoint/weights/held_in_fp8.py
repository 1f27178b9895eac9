"""Parameters that Transformer Engine holds in FP8 (`fp8.param_gather`), as numbers of their nominal dtype."""

from __future__ import annotations

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor


def values(parameter: torch.nn.Parameter) -> Tensor:
    """What the parameter computes with, in its nominal dtype: itself, or a new tensor where it is held in FP8."""
    parameter = parameter.detach()
    return dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter


@torch.no_grad()
def assign(parameter: torch.nn.Parameter, numbers: Tensor) -> None:
    """Fill the parameter with numbers of any dtype, on any device.

    An optimizer that is built over it later takes its fp32 main parameter from what was there before FP8, which Transformer
    Engine keeps on the host from the initialisation until then: that, too, becomes `numbers`.
    """
    if not is_float8tensor(parameter):
        parameter.copy_(numbers)
        return
    parameter.copy_(numbers.to(parameter.device, parameter.dtype))
    if getattr(parameter, "_high_precision_init_val", None) is not None:
        parameter._high_precision_init_val = numbers.to("cpu", parameter.dtype, copy=True)
