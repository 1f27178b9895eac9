from types import SimpleNamespace

from transformer_engine.pytorch import distributed
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.modules import (
    DotProductAttention,
    Fp8Padding,
    Fp8Unpadding,
    GroupedLinear,
    LayerNorm,
    LayerNormLinear,
    Linear,
    RMSNorm,
)

ops = SimpleNamespace(Sequential=object, FusibleOperation=object)  # named in annotations

__all__ = ["DotProductAttention", "Fp8Padding", "Fp8Unpadding", "GroupedLinear", "LayerNorm", "LayerNormLinear", "Linear",
           "RMSNorm", "distributed", "fp8_autocast", "fp8_model_init", "ops"]  # fmt: skip
