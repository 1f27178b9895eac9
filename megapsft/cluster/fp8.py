"""Weights in FP8: what the copies that Transformer Engine multiplies with add to the memory of a rank.

Source: Transformer Engine 2.19, `quantize_weight`: a layer keeps its weight as it was rounded for the first microbatch, by rows
for the forward pass, and by columns for the backward pass.
"""

from __future__ import annotations

from megapsft.cluster.sizes import products_of_layer
from megapsft.config import Config, FP8Config
from megapsft.models.hf_config import HFConfig
from megapsft.parallel import Mesh

BF16 = 2  # bytes
SCALES = {"delayed": 0, "tensorwise": 0, "blockwise": 4 / 128**2, "mxfp8": 1 / 32}  # bytes a number, beside its own
ANY_ORDER = (10, 0)  # from this compute capability on, one copy serves both passes where a tensor has one scale


def added_by_fp8(config: Config, hf: HFConfig, mesh: Mesh, stage: int, capability: tuple[int, int], trained: bool) -> float:
    """Bytes on each rank of `stage`, beside those of bfloat16; below zero where weights in FP8 are held in their place.

    Args:
        capability: of the GPU.
        trained: whether a backward pass follows; a reference has none.
    """
    if config.fp8.format is None:
        return 0
    layers = sum(1 for layer in layers_in_fp8(config.fp8, hf.num_hidden_layers) if stage_of(layer, hf, mesh) == stage)
    numbers = layers * products_of_layer(hf, mesh.tp, mesh.ep, mesh.etp)
    return numbers * (copies(config.fp8, capability, trained) - (BF16 if config.fp8.param_gather else 0))


def copies(fp8: FP8Config, capability: tuple[int, int], trained: bool) -> float:
    """Bytes of a number of a weight."""
    one_scale = fp8.recipe in ("delayed", "tensorwise")
    twice = trained and not (one_scale and capability >= ANY_ORDER)
    return (1 + twice) * (1 + SCALES[fp8.recipe])


def layers_in_fp8(fp8: FP8Config, layers: int) -> range:
    """Numbers, from 0, of those that are not left in bfloat16."""
    return range(fp8.num_layers_at_start_in_bf16, layers - fp8.num_layers_at_end_in_bf16)


def stage_of(layer: int, hf: HFConfig, mesh: Mesh) -> int:
    """The pipeline stage that holds a layer: with several chunks a stage, the stages take turns."""
    return layer // (hf.num_hidden_layers // (mesh.pp * mesh.vpp)) % mesh.pp


__all__ = ["added_by_fp8", "copies", "layers_in_fp8", "stage_of"]
