"""Import a Hugging Face folder with Megatron-Bridge 0.3.1 on the CPU and save it as a torch_dist checkpoint.

    python benchmarks/peers/bridge_import.py SOURCE OUT

Wants an environment of its own: `pip install --no-deps megatron-bridge==0.3.1`, and `transformers<5 omegaconf torch
megatron-core==0.16.1` with what these need. Without a GPU it only runs with what follows:

- modules that are not there, transformer_engine and triton, are replaced by empty ones; after Megatron-Core was imported,
  which then knows that it has neither;
- the local layer spec, no fusions, experts dispatched by all-gather: all else calls CUDA;
- `torch.cuda.synchronize` and `torch.cuda.current_device`, which Megatron-Core calls when it saves, do nothing.

The conversion itself is Bridge's, the saving Megatron-Core's. Its export of a model of experts cannot be had this way: it
fails on the names of experts that are not grouped.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import torch

ABSENT = ("transformer_engine", "triton")


class Anything(type):
    """A class whose attributes are classes like itself."""

    def __getattr__(cls, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in ABSENT else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


def main(source: str, out: str) -> None:
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401 - before the stand-ins
    from megatron.core import dist_checkpointing, parallel_state

    sys.meta_path.append(Finder())
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec

    torch.cuda.synchronize = torch.cuda.current_device = lambda *args, **kwargs: None
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()

    bridge = AutoBridge.from_hf_pretrained(source, torch_dtype=torch.bfloat16)
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.transformer_layer_spec = local_layer_spec
    provider.moe_token_dispatcher_type = "allgather"
    provider.moe_grouped_gemm = False
    provider.use_cpu_initialization = True
    for name in vars(provider):
        if name.endswith("_fusion"):
            setattr(provider, name, False)
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)

    Path(out).mkdir(parents=True)
    dist_checkpointing.save(model.sharded_state_dict(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
