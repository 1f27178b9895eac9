"""Whether two checkpoints give the same logits: the one in transformers, the other there too, or in our own Megatron model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megapsft.checkpoint.convert.verify import Report, Side, open_side
from megapsft.checkpoint.convert.workers import Options
from megapsft.checkpoint.hf import fill
from megapsft.checkpoint.hf_folder import ModelWeights, is_hf
from megapsft.checkpoint.weights.cast import Cast
from megapsft.config import ModelConfig, ParallelConfig
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.models.names import HF_EMBEDDING
from megapsft.parallel import initialize, plan_mesh, shutdown
from megapsft.platform.compat import hush
from megapsft.platform.cpu import has_cuda
from megapsft.platform.launch import become_world_of_one
from megapsft.policy.build import build_chunks, model_shape, transformer_config

SAMPLE = (2, 64)  # sequences of random tokens
TOLERANCE = 1e-4  # of the largest logit, in fp32


def compare_logits(hf_dir: Path, against: Path, model: Path | None, report: Report) -> None:
    """Add to the report how far the logits of the two are apart, in fp32; both models are in memory one after the other."""
    left, right = open_side(hf_dir, None, Options()), open_side(against, model, Options())
    if left.hf.vocab_size != right.hf.vocab_size:
        return  # a problem that the report has already
    tokens = torch.randint(0, left.hf.vocab_size, SAMPLE, generator=torch.Generator().manual_seed(0))
    stored = [side.weights.tensors[HF_EMBEDDING].dtype for side in (left, right)]
    narrow = min(stored, key=lambda dtype: dtype.itemsize)  # rounding of weights is not what is looked for
    ours = _in_transformers(left, tokens, narrow)
    theirs = (_in_transformers if is_hf(right.path) else _in_megatron)(right, tokens, narrow)
    gap, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    agree = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    text = f"logits on {tokens.numel()} random tokens differ by {gap:.2e} at most (the largest is {largest:.2f}); "
    text += f"the likeliest next token is the same at {agree:.1%} of them"
    if gap <= TOLERANCE * max(1.0, largest):
        report.notes.append(text)
    else:
        report.problems.append(text)


@torch.no_grad()
def _in_transformers(side: Side, tokens: Tensor, rounded: torch.dtype) -> Tensor:
    """[..., vocabulary] as transformers reads and computes it."""
    import transformers

    if side.hf.fp8_block is not None:
        rule = "is in FP8, which transformers computes on a GPU only"
        raise Refused(str(side.path), rule, "leave out --logits, or compare an export without --fp8-blockwise")
    transformers.logging.disable_progress_bar()
    model = getattr(transformers, side.hf.architecture).from_pretrained(side.path, dtype=rounded).float().eval()
    return model(tokens).logits


@torch.no_grad()
def _in_megatron(side: Side, tokens: Tensor, rounded: torch.dtype) -> Tensor:
    """[..., vocabulary] of the model that we train, built in this process."""
    family, parallel, model = family_of(side.hf), ParallelConfig(), ModelConfig(dtype="float32")
    become_world_of_one()
    hush()
    mesh = plan_mesh(parallel, 1, model_shape(side.hf), has_cuda())
    initialize(mesh, parallel, seed=0)
    try:
        (chunk,) = build_chunks(transformer_config(family, side.hf, model, parallel, mesh), side.hf, model, mesh)
        fill([chunk], ModelWeights(Cast(side.weights, rounded)).read, side.hf)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        device = next(chunk.parameters()).device
        logits = chunk.eval()(tokens.to(device), positions.to(device), None)
        return logits[..., : side.hf.vocab_size].float().cpu()
    finally:
        shutdown()
