"""The models that a comparison names: Hugging Face folders, or checkpoints of runs, over one vocabulary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megapsft.checkpoint.adapters import merges_adapters
from megapsft.checkpoint.convert.megatron_to_hf import model_of_run
from megapsft.checkpoint.dist import load_model
from megapsft.checkpoint.hf import check_checkpoint, import_hf, read_config
from megapsft.checkpoint.state import STATE, check_architecture, read_state
from megapsft.data.chat_template import load_tokenizer
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.parallel import plan_mesh
from megapsft.platform.cpu import has_cuda
from megapsft.policy.build import Policy, build_chunks, half, model_shape, transformer_config
from megapsft.train.build import policy_of
from megapsft.train.plan import RunPlan, layout_of


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A model that has been looked at, and not been loaded."""

    name: str
    path: Path
    about: Path  # the folder with its config.json and tokenizer
    hf: HFConfig

    @property
    def is_checkpoint(self) -> bool:
        return self.about != self.path

    def fill(self, chunks: list[GPTModel]) -> None:
        """Collective."""
        if self.is_checkpoint:
            load_model(self.path, chunks)
        else:
            import_hf(chunks, self.path, self.hf)


def open_folder(path: Path, name: str | None = None) -> Folder:
    """Look at a Hugging Face folder, or at RUN/checkpoints/step-*.

    Args:
        name: default: the name of the run, or of the folder.

    Raises:
        Refused: it is neither, or not whole; adapters alone.
    """
    path = path.resolve()
    if not (path / STATE).is_file():
        hf = read_config(path)
        check_checkpoint(path, family_of(hf), hf)
        return Folder(name=name or path.name, path=path, about=path, hf=hf)
    run, state = path.parents[1], read_state(path)
    if merges_adapters(state):
        raise Refused(str(path), "holds adapters alone", f"merge them: megapsft export {run} --checkpoint {path.name} --out DIR")
    about = model_of_run(run)
    hf = read_config(about)
    check_architecture(path, state, hf)
    return Folder(name=name or run.name, path=path, about=about, hf=hf)


def check_same_vocabulary(base: Folder, others: list[Folder]) -> None:
    """Refuse a model that does not know the base's tokens as the same numbers: its probabilities would be of other words."""
    ours = load_tokenizer(base.about).get_vocab()
    for other in others:
        rule, remedy = None, "compare models with the same tokenizer"
        if other.hf.vocab_size != base.hf.vocab_size:
            rule = f"has a vocabulary of {other.hf.vocab_size}, and {base.path} one of {base.hf.vocab_size}"
        else:
            theirs = load_tokenizer(other.about).get_vocab()
            differing = sorted(word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word))
            if differing:
                rule = f"has another tokenizer than {base.path}: {differing[0]!r} is {theirs.get(differing[0])} in it, "
                rule += f"and {ours.get(differing[0])} there"
        if rule is not None:
            raise Refused(str(other.path), rule, remedy)


def plan_of(plan: RunPlan, folder: Folder) -> RunPlan:
    """The plan with the model of `folder` in place of its own; samples stay as they are.

    Raises:
        Refused: the model cannot be split or packed so, or has not the context for these samples.
    """
    config, hf = plan.config, folder.hf
    longest = max(len(sample) for sample in plan.data.samples)
    if longest > hf.max_position_embeddings:
        rule = f"has a context of {hf.max_position_embeddings} tokens, and the longest sample has {longest}"
        raise Refused(str(folder.path), rule, f"use data.max_length={hf.max_position_embeddings}")
    mesh = plan_mesh(config.parallel, plan.mesh.world_size, model_shape(hf), has_cuda(), config.model.moe_token_dispatcher_type)
    if layout_of(config, mesh) != plan.layout():  # experts are split otherwise: tokens would not be where the base's are
        rule = f"would have its samples packed otherwise than {config.model.path}"
        raise Refused(str(folder.path), rule, "use parallel.sequence_parallel=true, or no tensor and expert parallelism")
    model = dataclasses.replace(config.model, path=str(folder.path))
    return dataclasses.replace(plan, config=dataclasses.replace(config, model=model), hf=hf, family=family_of(hf), mesh=mesh)


@torch.no_grad()
def frozen_policy(plan: RunPlan, folder: Folder) -> Policy:
    """Collective. The model of `folder`, as `plan` of `plan_of` lays it out, for passes without gradient."""
    config = plan.config
    megatron = transformer_config(plan.family, plan.hf, config.model, config.parallel, plan.mesh, config.fp8)
    chunks = build_chunks(megatron, plan.hf, config.model, plan.mesh)
    folder.fill(chunks)
    return policy_of(plan, half(chunks, megatron), megatron)


__all__ = ["Folder", "check_same_vocabulary", "frozen_policy", "open_folder", "plan_of"]
