"""States to continue from: torch_dist folders with model, optimizer, generators and the run's own state.

    checkpoints/step-00000050/   metadata.json, *.distcp, common.pt (Megatron's), state.json (ours)
    checkpoints/latest -> step-00000050        a symbolic link, replaced atomically; best -> ... likewise
    checkpoints/step-00000100.partial/         being written, or left by a run that was killed; never read

A folder gets its name only when all of it is written, so a kill at any moment leaves `latest` whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megapsft.checkpoint.files.torch_dist import check_harmless, read_index
from megapsft.checkpoint.optimizer_state import adam_step, load_state, round_again, sharded_state
from megapsft.checkpoint.results import report_by_pipe
from megapsft.checkpoint.state import STATE, check_architecture, read_state, shape_of
from megapsft.checkpoint.together import from_first
from megapsft.checkpoint.weights.live import lora_of
from megapsft.config import CheckpointConfig
from megapsft.errors import Refused
from megapsft.models.adapters import is_adapter
from megapsft.platform.compat import save_checkpoint, transformer_engine_states
from megapsft.policy.build import Policy
from megapsft.policy.gather import gather_stale


class Trained(NamedTuple):
    """A model with its optimizer."""

    policy: Policy
    optimizer: ChainedOptimizer


class Checkpoints:
    """The checkpoints of one run: saved in the background, found again, pruned.

    Args:
        pinned: steps whose checkpoints are never pruned.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, pinned: frozenset[int] = frozenset()):
        self.folder, self.config, self.pinned = folder, config, pinned
        self.pending = AsyncCallsQueue()
        report_by_pipe()

    def save(self, step: int, state: dict[str, Any], models: Mapping[str, Trained], score: float | None = None) -> None:
        """Collective. Start writing the state after `step` steps; returns before it is on disk where `async_save`.

        Args:
            state: JSON values, given back by `read_state`; only the first rank's counts.
            models: by the prefix of their keys: "" is the policy, "critic." a critic.
            score: lower is better; None is never best.
        """
        self.finish()  # one at a time
        partial, final = self._folder(step, ".partial"), self._folder(step)
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        torch.distributed.barrier()
        content: dict[str, Any] = {"rng": _generators()}
        record = dict(state, score=score, mesh=_mesh(models[""].policy), **shape_of(models[""].policy.hf))
        for prefix, (policy, optimizer) in models.items():
            gather_stale(policy.chunks)
            content[f"{prefix}model"] = model_state(policy.gpt_models(), prefix)
            content[f"{prefix}optimizer"] = sharded_state(optimizer, content[f"{prefix}model"], is_loading=False)
            record[f"{prefix}adam_step"] = adam_step(optimizer)
        request = save_checkpoint(content, str(partial), async_sharded_save=self.config.async_save)

        def publish() -> None:
            if torch.distributed.get_rank() == 0:
                _write_json(partial / STATE, record)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
                _point(self.folder / "latest", final.name)
                self._keep(final, score)
            torch.distributed.barrier()

        if request is None:
            publish()
        else:
            request.add_finalize_fn(publish)
            self.pending.schedule_async_request(request)

    def finish(self, blocking: bool = True) -> None:
        """Collective. Publish what has been written; wait for it where `blocking`."""
        self.pending.maybe_finalize_async_calls(blocking=blocking)

    def load(self, path: Path, models: Mapping[str, Trained], with_optimizer: bool = True) -> None:
        """Collective. Fill the models (and their optimizers, where asked) from `path`, whatever split wrote it.

        Raises:
            Refused: a checkpoint of another architecture.
        """
        state, policy = read_state(path), models[""].policy
        check_architecture(path, state, policy.hf)
        content: dict[str, Any] = {}
        for prefix, (part, optimizer) in models.items():
            content[f"{prefix}model"] = model_state(part.gpt_models(), prefix)
            if with_optimizer:
                content[f"{prefix}optimizer"] = sharded_state(optimizer, content[f"{prefix}model"], is_loading=True)
        same_mesh = state["mesh"] == _mesh(policy)
        if with_optimizer and same_mesh:
            content["rng"] = _generators()
        loaded = _read(content, path)
        for prefix, (part, optimizer) in models.items():
            _fill(part.gpt_models(), loaded[f"{prefix}model"], prefix)
            if with_optimizer:
                sharded = model_state(part.gpt_models(), prefix)
                load_state(optimizer, sharded, loaded[f"{prefix}optimizer"], state[f"{prefix}adam_step"])
                if part.config.fp8_param:
                    round_again(optimizer, part.chunks)
        if with_optimizer and same_mesh:
            _restore_generators(loaded["rng"].data if isinstance(loaded["rng"], ShardedObject) else loaded["rng"])

    def _keep(self, newest: Path, score: float | None) -> None:
        """Move `best`, then delete all but the last few and the best."""
        best = self.folder / "best"
        if self.config.keep_best and score is not None:
            old = read_state(best)["score"] if best.exists() else None
            if old is None or score < old:
                _point(best, newest.name)
        names = sorted(path.name for path in self.folder.glob("step-*") if not path.name.endswith(".partial"))
        keep = set(names[-max(1, self.config.keep_last) :]) | {newest.name}
        keep |= {self._folder(step).name for step in self.pinned}
        if best.exists():
            keep.add(best.resolve().name)
        for name in names:
            if name not in keep:
                shutil.rmtree(self.folder / name)

    def _folder(self, step: int, suffix: str = "") -> Path:
        return self.folder / f"step-{step:08d}{suffix}"


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`, or None."""
    link = folder / "latest"
    if link.is_symlink() and not link.exists():
        there = ", ".join(sorted(path.name for path in folder.glob("step-????????"))) or "none"
        remedy = f"point it at a checkpoint that is there: {there}"
        raise Refused(str(link), f"points at {os.readlink(link)}, which is gone", remedy)
    return link.resolve() if link.exists() else None


def model_state(chunks: Sequence[GPTModel], prefix: str = "") -> dict[str, Any]:
    """Sharded tensors of all chunks; keys are of the whole model, so any split can read them. Of a model with adapters only they.

    What they are beside is frozen, and in the folder that the run started from.
    """
    state = {f"chunk{index}": gpt.sharded_state_dict(prefix=prefix) for index, gpt in enumerate(chunks)}
    if lora_of(chunks) is None:
        return state
    return {chunk: {key: value for key, value in tensors.items() if is_adapter(key)} for chunk, tensors in state.items()}


def load_model(path: Path, chunks: Sequence[GPTModel]) -> None:
    """Collective. Fill the chunks with the weights at `path`, whatever split wrote them."""
    _fill(chunks, _read({"model": model_state(chunks)}, path)["model"])


def _read(content: dict[str, Any], path: Path) -> dict[str, Any]:
    def checked() -> frozenset[str]:
        index = read_index(path)
        check_harmless(path, index)  # Megatron and Transformer Engine unpickle whatever is there
        return frozenset(index.objects)

    _drop_absent_states(content, from_first(checked))
    try:
        return dist_checkpointing.load(content, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    except (CheckpointingException, CheckpointException, EOFError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[-300:]
        raise Refused(str(path), f"cannot be read: ...{reason}", "point `latest` at an older checkpoint") from error


def _drop_absent_states(content: dict[str, Any], objects: frozenset[str]) -> None:
    """Do not ask for the `_extra_state` of layers that kept none in the checkpoint: local ones, or products not in FP8."""
    for chunks in (part for name, part in content.items() if name.endswith("model")):
        for chunk in chunks.values():
            for name in [name for name, entry in chunk.items() if "_extra_state" in name and entry.unique_key not in objects]:
                del chunk[name]


def _fill(chunks: Sequence[GPTModel], loaded: dict[str, Any], prefix: str = "") -> None:
    for index, gpt in enumerate(chunks):
        state = {name.removeprefix(prefix): tensor for name, tensor in loaded[f"chunk{index}"].items()}
        with transformer_engine_states():
            found = gpt.load_state_dict(state, strict=False)
        absent = () if lora_of(chunks) is not None else found.missing_keys  # what adapters are beside is not in a checkpoint
        amiss = [name for name in (*absent, *found.unexpected_keys) if "_extra_state" not in name]
        if amiss:
            raise Refused(f"parameter {amiss[0]}", "is in the model or the checkpoint alone", "load one of this architecture")


def _mesh(policy: Policy) -> str:
    return policy.mesh.describe()


def _generators() -> ShardedObject:
    """This rank's random state; only read again by the same rank of the same mesh."""
    state = {
        "python": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ShardedObject("rng", state, (size,), (rank,), replica_id=0)


def _restore_generators(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, key, *rest = state["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _point(link: Path, target: str) -> None:
    """Make `link` point at its sibling `target`, atomically."""
    temporary = link.with_name(link.name + ".new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
