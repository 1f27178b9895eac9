"""A stream of Hugging Face tensors into a model folder that appears complete, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megapsft.checkpoint.hf_folder import EMBEDDING, INDEX, LM_HEAD, SINGLE, open_checkpoint
from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig, both_spellings

COMPANIONS = (  # what a model folder holds beside config and weights
    "generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
READABLE = 0o644  # safetensors makes files that only their owner can read


def save_hf(
    stream: Iterable[tuple[str, Tensor | None]],
    hf: HFConfig,
    source_dir: str | Path,
    out_dir: str | Path,
    max_shard_bytes: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the tensors, the config and the tokenizer of a model as Hugging Face does. Collective where torch.distributed runs.

    Rank 0 writes, the others exhaust the stream; all return when the folder is there. It is written beside `out_dir` as
    `.NAME.partial` and renamed at the end. Memory: one shard.

    Args:
        stream: (name, tensor on the CPU); None instead of the tensor on ranks other than 0.
        source_dir: where tokenizer, chat template and generation config are copied from. With tied embeddings,
            lm_head.weight is written only if it is stored there.
        max_shard_bytes: a file of weights has no more than this, unless it is one tensor.
        dtype: of the weights; None: that of the tensors.

    Raises:
        Refused: `out_dir` is a file or a folder that is not empty.
    """
    out = Path(out_dir)
    _raise_together(lambda: check_free(out))
    if dist.is_initialized() and dist.get_rank() > 0:
        for _ in stream:
            pass
    else:
        partial = out.absolute().parent / f".{out.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
        try:
            tensors = ((name, tensor if dtype is None else tensor.to(dtype)) for name, tensor in stream)
            if hf.tie_word_embeddings and LM_HEAD in open_checkpoint(source_dir).shapes:
                tensors = _with_lm_head(tensors)
            stored = _write_weights(tensors, partial, max_shard_bytes)
            write_config(hf, stored, partial)
            copy_companions(Path(source_dir), partial)
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            os.rename(partial, out)  # onto an empty folder, too
            _sync(out.absolute().parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if dist.is_initialized():
        dist.barrier()


def check_free(out: Path) -> None:
    """That `out` can become a new model folder.

    Raises:
        Refused: it is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(str(out), "exists and is not an empty folder", "name another folder, or delete this one")


def write_config(hf: HFConfig, dtype: torch.dtype, folder: Path) -> None:
    """config.json for weights of `dtype`, spelt so that transformers 4 and 5 both read it right."""
    name = str(dtype).removeprefix("torch.")
    config = both_spellings({**hf.raw, "dtype": name, "torch_dtype": name})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template and generation config, as far as `source` has them."""
    for name in COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _with_lm_head(stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        yield name, tensor
        if name == EMBEDDING:
            yield LM_HEAD, tensor.clone()  # safetensors refuses tensors that share memory


def _write_weights(stream: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int) -> torch.dtype:
    """The safetensors and, where they are several, their index; gives the dtype of the weights."""
    shard: dict[str, Tensor] = {}
    shard_bytes = total_bytes = 0
    dtype = torch.float32
    names: list[list[str]] = []

    def close() -> None:
        names.append(list(shard))
        path = folder / f"{len(names):05d}.safetensors"  # how many there will be is known at the end
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(READABLE)
        shard.clear()

    for name, tensor in stream:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            close()
            shard_bytes = 0
        shard[name] = tensor.contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        dtype = tensor.dtype
    close()
    if len(names) == 1:
        (folder / "00001.safetensors").rename(folder / SINGLE)
        return dtype
    weight_map = {}
    for number, inside in enumerate(names, start=1):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        (folder / f"{number:05d}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(inside, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return dtype


def _raise_together(check: Callable[[], None]) -> None:
    """Run `check` on rank 0, and let what it refuses be raised on every rank."""
    refusal: list[Refused | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            check()
        except Refused as error:
            refusal[0] = error
    if dist.is_initialized():
        dist.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise refusal[0]


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
