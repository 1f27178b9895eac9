"""The engine of a model folder, where nothing is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megapsft import parallel
from megapsft.checkpoint.hf import import_hf, read_config
from megapsft.config import ModelConfig, ParallelConfig, RolloutConfig
from megapsft.errors import Refused
from megapsft.models.families import check_served, family_of
from megapsft.parallel import plan_mesh
from megapsft.platform.compat import hush
from megapsft.platform.cpu import has_cuda
from megapsft.platform.launch import become_world_of_one
from megapsft.policy.build import Policy, build_chunks, half, model_shape, transformer_config
from megapsft.policy.generate import InProcess
from megapsft.rollout.base import Engine
from megapsft.rollout.sglang.engine import SGLang

BATCHES = 4  # of max_batch_size that the engine in this process is given at once: it fills gaps, and a kill costs as many
EDGE = 1 << 16  # bytes of both ends of a file of weights that tell it from another

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Opened:
    engine: Engine
    streams: bool  # whether it tells of each response as it comes
    batch_size: int | None  # requests that it is given at once; None: all


def dtype_of(model: Path) -> Dtype:
    """That of the stored weights; bfloat16 where they are of another that is not computed in."""
    return "float32" if read_config(model).dtype == "float32" else "bfloat16"


def weights_digest(model: Path) -> str:
    """Tells the weights in a folder from others: names, sizes and both ends of their files."""
    digest = hashlib.blake2b(digest_size=16)
    files = [path for path in model.rglob("*") if path.suffix in (".safetensors", ".distcp", ".json") and path.is_file()]
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(model)}:{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read())
    return digest.hexdigest()


@contextmanager
def open_engine(model: Path, options: RolloutConfig, dtype: Dtype, work: Path) -> Iterator[Opened]:
    """The engine with the weights of the folder, until the end of the `with`; what was started is ended then.

    Args:
        options: of them those that say which engine, and how it runs.
        work: folder for what servers write.

    Raises:
        Refused: a model that cannot be read, no SGLang, or a server that does not start or is not given such a model.
    """
    with ExitStack() as stack:
        if options.engine == "inprocess":
            policy = stack.enter_context(_policy(model, dtype))
            engine: Engine = InProcess(policy, max_batch_size=options.max_batch_size)
            stack.callback(engine.close)
            yield Opened(engine, False, BATCHES * options.max_batch_size)
        else:
            check_served(read_config(model), "--engine sglang")
            engine = SGLang(options, model, work=work, dtype=dtype)
            stack.callback(engine.close)
            yield Opened(engine, True, None)


@contextmanager
def _policy(model: Path, dtype: Dtype) -> Iterator[Policy]:
    """The model in a world of this process alone."""
    options, split = ModelConfig(path=str(model), dtype=dtype), ParallelConfig()
    hf = read_config(model)
    family = family_of(hf)
    mesh = plan_mesh(split, 1, model_shape(hf), has_cuda(), options.moe_token_dispatcher_type)
    hush()
    become_world_of_one()
    parallel.initialize(mesh, split, seed=0)
    try:
        config = transformer_config(family, hf, options, split, mesh)
        chunks = build_chunks(config, hf, options, mesh)
        import_hf(chunks, model, hf)
        yield Policy(chunks=half(chunks, config), config=config, family=family, hf=hf, source=model, mesh=mesh)
    finally:
        parallel.shutdown()


def check_room(model: Path, longest_prompt: int, max_tokens: int) -> None:
    """Refuse responses that the model has no positions for."""
    most = read_config(model).max_position_embeddings
    if longest_prompt + max_tokens > most:
        rule = f"and prompts of up to {longest_prompt} tokens exceed max_position_embeddings={most} of {model}"
        remedy = f"use --max-tokens {most - longest_prompt}" if longest_prompt < most else "use a model with a longer context"
        raise Refused(f"max_tokens={max_tokens}", rule, remedy)
