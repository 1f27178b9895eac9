"""From a Hugging Face checkpoint to a policy: Megatron's GPTModel under the mesh's split, its head giving log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megapsft.config import FP8Config, ModelConfig, ParallelConfig
from megapsft.models.family import Family
from megapsft.models.hf_config import HFConfig
from megapsft.models.layer_spec import layer_spec
from megapsft.models.rope import inverse_frequencies
from megapsft.parallel import Mesh, ModelShape
from megapsft.platform.compat import fusions
from megapsft.platform.machine import layers_of, this_machine
from megapsft.policy.backend import working_backend
from megapsft.policy.vocab_parallel import LogprobHead

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NO_FP8 = FP8Config()


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The model on this rank: one chunk a virtual pipeline stage, wrapped for data parallelism where it is trained."""

    chunks: list[torch.nn.Module]
    config: TransformerConfig
    family: Family
    hf: HFConfig
    source: Path  # the Hugging Face folder it came from
    mesh: Mesh
    temperature: float = 1.0  # divides the logits in every pass
    routing_replay: bool = False  # the training pass chooses the experts of the old pass
    no_grad_microbatches: int = 1  # packed ones that a pass without gradient takes as one

    @property
    def device(self) -> torch.device:
        return next(self.chunks[0].parameters()).device

    @property
    def frozen(self) -> bool:
        """Whether its weights stay as they are, and adapters beside them are trained."""
        return getattr(self.gpt_models()[0], "lora", None) is not None

    def gpt_models(self) -> list[GPTModel]:
        return [unwrap(chunk) for chunk in self.chunks]

    def output_weight(self) -> torch.nn.Parameter | None:
        """[V / p, D] of the output layer, tied or not; None where this pipeline stage has none."""
        last = self.gpt_models()[-1]
        if not last.post_process:
            return None
        tied = last.share_embeddings_and_output_weights
        return last.shared_embedding_or_output_weight() if tied else last.output_layer.weight

    def head(self) -> torch.nn.Module | None:
        """The output layer, on the last pipeline stage: a LogprobHead, or a critic's ValueHead."""
        last = self.gpt_models()[-1]
        return last.output_layer if last.post_process else None


def unwrap(module: torch.nn.Module) -> GPTModel:
    """The GPTModel inside wrappers for data parallelism and mixed precision."""
    while not isinstance(module, GPTModel):
        module = module.module
    return module


def model_shape(hf: HFConfig) -> ModelShape:
    """The numbers that a split must divide."""
    return ModelShape(
        num_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        ffn_hidden_size=hf.moe_intermediate_size if hf.num_experts else hf.intermediate_size,
        num_experts=hf.num_experts,
    )


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of `divisible_by * tp`, as in Megatron-LM."""
    unit = divisible_by * tp
    return -(-vocab_size // unit) * unit


def transformer_config(
    family: Family, hf: HFConfig, model: ModelConfig, parallel: ParallelConfig, mesh: Mesh, fp8: FP8Config = NO_FP8
) -> TransformerConfig:
    """Megatron's config: the family's architecture, the mesh's split, whose layers, and our numerics.

    Raises:
        Refused: layers of Transformer Engine are asked for, and cannot be.
    """
    dtype, layers = DTYPES[model.dtype], layers_of(model, this_machine())
    options = dict(
        family.transformer_config(hf),
        transformer_impl=layers,
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        virtual_pipeline_model_parallel_size=mesh.vpp if mesh.vpp > 1 else None,
        context_parallel_size=mesh.cp,
        expert_model_parallel_size=mesh.ep,
        expert_tensor_parallel_size=mesh.etp,
        sequence_parallel=mesh.sequence_parallel,
        overlap_p2p_comm=mesh.overlap_p2p_comm,
        batch_p2p_comm=mesh.batch_p2p_comm,
        # gloo may still be sending an output when it is deallocated; CUDA streams keep the order
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,  # gradients are summed, then divided once by the update's number of tokens
        # the import fills every parameter, but Megatron marks tensor-parallel ones, without which norms are wrong, only here
        perform_initialization=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        attention_softmax_in_fp32=True,
        bias_dropout_fusion=False,  # there is neither bias nor dropout
        masked_softmax_fusion=False,  # of Megatron's own attention, which is not used
        gradient_accumulation_fusion=False,  # Megatron's would need apex for the output layer; `distribute` sets the layers'
    )
    if layers == "transformer_engine":
        options |= dict(fusions(), bias_activation_fusion=True)
    if fp8.format is not None:
        options |= fp8_options(fp8)
    if hf.num_experts:
        options |= dict(
            moe_token_dispatcher_type=model.moe_token_dispatcher_type,
            moe_grouped_gemm=layers == "transformer_engine",
            # Megatron's would be scaled by 1 / (tp cp) with calculate_per_token_loss, and count padding; ours: models/router.py
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        )
    if parallel.recompute_granularity == "full":
        options |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif parallel.recompute_granularity == "selective":
        options |= dict(recompute_granularity="selective", recompute_modules=list(parallel.recompute_modules))
    return TransformerConfig(**options)


def fp8_options(fp8: FP8Config) -> dict[str, Any]:
    """Megatron's keyword arguments for products in FP8."""
    start, end = fp8.num_layers_at_start_in_bf16, fp8.num_layers_at_end_in_bf16
    return dict(
        fp8=fp8.format,
        fp8_recipe=fp8.recipe,
        fp8_param=fp8.param_gather,
        first_last_layers_bf16=start + end > 0,
        num_layers_at_start_in_bf16=start,
        num_layers_at_end_in_bf16=end,
        fp8_amax_history_len=fp8.amax_history_len,
        fp8_amax_compute_algo=fp8.amax_compute_algo,
    )


def build_chunks(config: TransformerConfig, hf: HFConfig, model: ModelConfig, mesh: Mesh) -> list[GPTModel]:
    """Collective. This rank's GPTModel chunks with uninitialised parameters; the last stage's output layer is a LogprobHead."""
    backend, _ = working_backend(model.logprob_backend)
    chunks = []
    for stage in range(mesh.vpp):
        vp_stage = stage if mesh.vpp > 1 else None
        gpt = GPTModel(
            config=config,
            transformer_layer_spec=layer_spec(config, vp_stage),
            vocab_size=padded_vocab_size(hf.vocab_size, model.make_vocab_size_divisible_by, mesh.tp),
            max_sequence_length=hf.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=hf.rope.theta,
            vp_stage=vp_stage,
        )
        # ours: Megatron knows one rope scaling, and hard-codes its original context length
        gpt.rotary_pos_emb.inv_freq = inverse_frequencies(hf).to(gpt.rotary_pos_emb.inv_freq.device)
        if gpt.post_process:
            LogprobHead.adopt(gpt.output_layer, hf.vocab_size, model.logprob_chunk_bytes, backend)
        if torch.cuda.is_available():
            gpt.cuda(torch.cuda.current_device())
        chunks.append(gpt)
    return chunks


def half(chunks: list[GPTModel], config: TransformerConfig) -> list[torch.nn.Module]:
    """Wrapped for mixed precision where the config asks for it."""
    return [Float16Module(config, chunk) for chunk in chunks] if config.bf16 else list(chunks)


def distribute(chunks: list[GPTModel], config: TransformerConfig, parallel: ParallelConfig) -> list[torch.nn.Module]:
    """Wrap for mixed precision and data parallelism: fp32 gradients, summed (not averaged) over the data-parallel ranks."""
    chunks = half(chunks, config)
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=bool(parallel.overlap_grad_reduce),
        overlap_param_gather=bool(parallel.overlap_param_gather),
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        fp8_param_gather=config.fp8_param,
    )
    wrapped = [
        DistributedDataParallel(config, options, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
    ]
    for module in (module for chunk in chunks for module in chunk.modules() if hasattr(module, "fuse_wgrad_accumulation")):
        module.fuse_wgrad_accumulation = True  # Transformer Engine's: into the fp32 `main_grad`, now that it is there
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


@contextmanager
def without_fp8(config: TransformerConfig) -> Iterator[None]:
    """Products of layers in bfloat16 inside of the context, whatever their number of tokens."""
    recipe, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = recipe
