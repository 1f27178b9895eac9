"""Megatron-Core on a machine without CUDA (torch CPU, gloo).

An import hook, for `megatron.*` only, rewrites each module's syntax tree as it is loaded: `torch.cuda` becomes the stand-in
of `megapsft.platform.cuda`, 'cuda' becomes 'cpu', `x.cuda()` becomes `x.cpu()`. Torch itself is never patched, so
`torch.cuda.is_available()`, Hugging Face and the user's own code see what is true; line numbers in tracebacks stay right.
Where CUDA exists the hook steps aside and Megatron loads untouched.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.machinery
import logging
import marshal
import os
import re
import sys
import tempfile
import types
import warnings
from pathlib import Path

from megapsft.platform.apex import hide_other_apex

PREFIX = "megatron."
STANDIN = "_cuda_standin"  # the name under which rewritten modules find the stand-in


class CudaToCpu(ast.NodeTransformer):
    """The rewriting of one module."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr == "cuda":
            return ast.copy_location(ast.Name(STANDIN, node.ctx), node)
        if node.attr == "is_cuda":
            node.attr = "is_cpu"
        return self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.level == 0 and node.module == "torch.cuda":
            node.module = "megapsft.platform.cuda"
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            if re.fullmatch(r"cuda(:\d+)?", node.value):
                node.value = "cpu"
            elif node.value.startswith("torch.cuda."):  # type strings: 'torch.cuda.FloatTensor'
                node.value = node.value.replace("torch.cuda.", "torch.")
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute):
            return node
        if node.func.attr == "cuda":  # x.cuda(device, non_blocking=...) -> x.cpu()
            node.func.attr, node.args, node.keywords = "cpu", [], []
        elif node.func.attr == "pin_memory" and not node.args:  # x.pin_memory() -> x
            return node.func.value
        elif node.func.attr == "record_stream":
            return ast.copy_location(ast.Constant(None), node)
        for keyword in node.keywords:
            if keyword.arg == "pin_memory":
                keyword.value = ast.copy_location(ast.Constant(False), keyword.value)
        return node


def _missing_names() -> dict[str, dict[str, object]]:
    """Names that 0.16.1 uses but defines only where Transformer Engine is installed."""
    return {
        "megatron.core.transformer.moe.moe_utils": {"te_general_gemm": None},
        "megatron.core.tensor_parallel.random": {
            "FP8GlobalStateManager": types.SimpleNamespace(is_fp8_enabled=lambda: False),
            "activation_recompute_forward": lambda *args, **kwargs: contextlib.nullcontext(),
            "fp8_autocast": lambda *args, **kwargs: contextlib.nullcontext(),
        },
    }


def _replaced_names(module: str) -> dict[str, object]:
    """The optimizer a GPU would have, in plain torch: with torch's own AdamW distributed checkpoints cannot be loaded."""
    if module not in ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"):
        return {}
    from megapsft.platform.fused_adam import FusedAdam

    names: dict[str, object] = {"Adam": FusedAdam}
    if module.endswith("distrib_optimizer"):
        return names | {"HAVE_APEX_OR_TE": True, "USING_TE_OPTIMIZER": True}
    return names | {"USING_PYTORCH_OPTIMIZER": False}


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        """Compiled code of the rewritten source, from our own cache: Python's .pyc must stay those of the true source."""
        path = self.get_filename(fullname)
        source = self.get_data(path)
        rewriter = Path(__file__).read_bytes()
        digest = hashlib.sha256(b"\0".join((source, rewriter, path.encode(), sys.version.encode()))).hexdigest()
        cached = _cache_dir() / f"{digest}.code"
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):
            return marshal.loads(cached.read_bytes())
        tree = ast.fix_missing_locations(CudaToCpu().visit(ast.parse(source, path)))
        code = compile(tree, path, "exec", dont_inherit=True)
        with contextlib.suppress(OSError):  # a read-only home costs time, nothing else
            cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=cached.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(marshal.dumps(code))
            os.replace(temporary, cached)
        return code

    def exec_module(self, module: types.ModuleType) -> None:
        from megapsft.platform import cuda

        setattr(module, STANDIN, cuda)
        with warnings.catch_warnings():  # "Apex is not installed": known, and no news without a GPU
            warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # of Megatron's own modules among themselves
            warnings.filterwarnings("ignore", category=SyntaxWarning)  # of escapes in its strings, from Python 3.12 on
            super().exec_module(module)
        if module.__name__ == "megatron.core.jit":
            module.disable_jit_fuser()  # torch.compile needs a C++ compiler and costs more than it gives here
        for name, value in _missing_names().get(module.__name__, {}).items():
            if not hasattr(module, name):
                setattr(module, name, value)
        for name, value in _replaced_names(module.__name__).items():
            setattr(module, name, value)


def _cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "megapsft" / "megatron-cpu"


class _Finder:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(PREFIX) or has_cuda():
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def has_cuda() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def install() -> None:
    """Put the hook in place, once, and an `apex` that is not NVIDIA's out of Megatron's way.

    Raises:
        ImportError: megatron was imported before, untouched, on a machine without CUDA.
    """
    if _Finder in sys.meta_path:
        return
    hide_other_apex()
    if any(name.startswith("megatron.core") for name in sys.modules) and not has_cuda():
        raise ImportError("megapsft must be imported before megatron on a machine without CUDA; move `import megapsft` up")
    sys.meta_path.insert(0, _Finder)
    # one generator plays both the CPU's and the device's part, so Megatron would warn at every fork of it
    rng_logger = logging.getLogger("megatron.core.tensor_parallel.random")
    rng_logger.addFilter(lambda record: has_cuda() or "CPU RNG state changed" not in record.getMessage())
