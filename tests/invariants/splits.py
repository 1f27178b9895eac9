"""The splits that are compared with one rank."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "sp": "parallel.sequence_parallel",
    "zero1": "parallel.use_distributed_optimizer",
    "overlap": "parallel.overlap_grad_reduce",
    "gather": "parallel.overlap_param_gather",
    "recompute": "parallel.recompute_granularity",
    "modules": "parallel.recompute_modules",
    "mbs": "data.micro_batch_size",
    "pack": "data.pack_length",
    "packing": "data.packing",
    "chunk": "model.logprob_chunk_bytes",
    "dispatcher": "model.moe_token_dispatcher_type",
    "rank": "lora.rank",
}


@dataclass(frozen=True)
class Split:
    name: str
    world: int
    options: tuple[str, ...]  # config overrides
    kinds: tuple[str, ...] = ("dense", "moe")


def split(name: str, world: int = 1, kinds: tuple[str, ...] = ("dense", "moe"), **options: object) -> Split:
    """Packed unless `packing=False`; options by their short names."""
    return Split(name, world, tuple(f"{NAMES[key]}={str(value).lower()}" for key, value in options.items()), kinds)


DENSE, MOE = ("dense",), ("moe",)
REFERENCE = split("1 rank", packing=False, mbs=1)
SPLITS = (
    split("microbatches of 2", packing=False, mbs=2),
    split("microbatches of 4", packing=False, mbs=4),
    split("packed to 256", pack=256),
    split("packed to 1024", pack=1024),
    split("chunked logits", pack=256, chunk=60000),  # the head recomputes them; elsewhere one chunk holds all
    split("recompute full", pack=256, recompute="full"),
    split("recompute core_attn", pack=256, recompute="selective", modules="[core_attn]"),
    split("recompute mlp, layernorm", kinds=DENSE, pack=256, recompute="selective", modules="[mlp,layernorm]"),
    split("recompute moe", kinds=MOE, pack=256, recompute="selective", modules="[moe]"),
    split("tp2", 2, DENSE, pack=256, tp=2),
    split("tp2+sp", 2, pack=256, tp=2, sp=True),
    split("tp2+sp unpacked", 2, packing=False, mbs=2, tp=2, sp=True),
    split("tp2+sp recompute full", 2, pack=256, tp=2, sp=True, recompute="full"),
    split("tp2+sp chunked logits", 2, pack=256, tp=2, sp=True, chunk=60000),
    split("pp2", 2, pack=256, pp=2),
    split("pp2 unpacked", 2, packing=False, mbs=2, pp=2),
    split("pp2+vpp2", 2, pack=256, pp=2, vpp=2),
    split("cp2", 2, pack=256, cp=2),
    split("cp2 unpacked", 2, packing=False, mbs=2, cp=2),
    split("dp2", 2, pack=256),
    split("dp2 unpacked", 2, packing=False, mbs=4),
    split("dp2+zero1", 2, pack=256, zero1=True),
    split("dp2+zero1+overlap", 2, pack=256, zero1=True, overlap=True, gather=True),
    split("tp2+cp2+sp", 4, pack=256, tp=2, cp=2, sp=True),
    split("tp2+pp2+sp", 4, pack=256, tp=2, pp=2, sp=True),
    split("ep2", 2, MOE, pack=256, ep=2),
    split("ep2 allgather", 2, MOE, pack=256, ep=2, dispatcher="allgather"),
    split("ep2+zero1", 2, MOE, pack=256, ep=2, zero1=True),
    split("tp2+ep2+etp1", 2, MOE, pack=256, tp=2, ep=2, etp=1),
    split("pp2+ep2", 4, MOE, pack=256, pp=2, ep=2),
)
