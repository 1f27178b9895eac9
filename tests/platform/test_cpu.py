"""The import hook that lets Megatron run without CUDA: what it rewrites, and what it leaves alone.

Not here: that what Megatron then computes is right (tests/policy, tests/invariants).
"""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from megapsft.platform import cuda
from megapsft.platform.cpu import STANDIN, CudaToCpu, _Loader

ROOT = Path(__file__).parents[2]


def rewritten(source: str) -> str:
    return ast.unparse(CudaToCpu().visit(ast.parse(source)))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("torch.cuda.current_device()", f"{STANDIN}.current_device()"),
        ("torch.cuda.nvtx.range_push('a')", f"{STANDIN}.nvtx.range_push('a')"),
        ("x.torch.cuda", "x.torch.cuda"),
        ("from torch.cuda import Stream", "from megapsft.platform.cuda import Stream"),
        ("from torch import nn", "from torch import nn"),
        ("t.to('cuda')", "t.to('cpu')"),
        ("torch.empty(3, device='cuda:1')", "torch.empty(3, device='cpu')"),
        ("f('cuda graphs')", "f('cuda graphs')"),
        ("t.type() == 'torch.cuda.HalfTensor'", "t.type() == 'torch.HalfTensor'"),
        ("t.cuda()", "t.cpu()"),
        ("f(a.b).cuda(torch.cuda.current_device(), non_blocking=True)", "f(a.b).cpu()"),
        ("t.is_cuda", "t.is_cpu"),
        ("t.pin_memory()", "t"),
        ("torch.empty(3, pin_memory=True)", "torch.empty(3, pin_memory=False)"),
        ("t.record_stream(s)", "None"),
        ("cuda(t)", "cuda(t)"),
    ],
)
def test_one_construct(before, after):
    assert rewritten(before) == after


def test_nothing_else_changes():
    source = ast.unparse(ast.parse(inspect.getsource(shutil)))
    assert rewritten(source) == source


@pytest.fixture
def module(tmp_path):
    """Loads a source as Megatron's modules are loaded."""

    def load(source: str) -> types.ModuleType:
        path = tmp_path / "small.py"
        path.write_text(textwrap.dedent(source))
        loader = _Loader("small", str(path))
        made = types.ModuleType("small")
        made.__file__ = str(path)
        loader.exec_module(made)
        return made

    return load


@pytest.mark.filterwarnings("error")
def test_a_module_with_an_unknown_escape_loads_without_a_word(module):
    assert module(r'BAR = "\|"').BAR == r"\|"


def test_a_rewritten_module_runs_on_the_cpu(module):
    made = module("""
        import torch
        from torch.cuda import Event, Stream

        def work():
            start, end = Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            with torch.cuda.stream(Stream()):
                t = torch.ones(2, device=torch.cuda.current_device()).cuda(non_blocking=True).pin_memory()
                t.record_stream(torch.cuda.current_stream())
            torch.cuda.synchronize()
            end.record()
            return t, start.elapsed_time(end)

        def state():
            return torch.cuda.get_rng_state(), torch.cuda.default_generators[0]
    """)
    tensor, milliseconds = made.work()
    assert tensor.device == torch.device("cpu")
    assert milliseconds >= 0
    assert torch.equal(made.state()[0], torch.get_rng_state())
    assert made.state()[1] is torch.default_generator
    assert made.Stream is cuda.Stream


def test_torch_itself_is_not_touched():
    code = """
        import torch
        before = {name: value for name, value in vars(torch.cuda).items()}
        import megapsft
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random
        changed = [name for name, value in before.items() if vars(torch.cuda).get(name) is not value]
        print(changed, torch.cuda.is_available(), parallel_state.torch is torch)
    """
    assert python(code).stdout.split("\n")[0] == "[] False True"


def test_megatron_must_not_be_there_before_us():
    done = python("import megatron.core\nimport megapsft", fails=True)
    message = "ImportError: megapsft must be imported before megatron on a machine without CUDA; move `import megapsft` up"
    assert message in done.stderr


def test_tracebacks_show_the_true_lines(module):
    made = module("""
        import torch

        def first(t):
            t.record_stream(torch.cuda.current_stream())

            return t.cuda(
                non_blocking=True,
            ).no_such_attribute
    """)
    with pytest.raises(AttributeError) as caught:
        made.first(torch.ones(1))
    assert caught.traceback[-1].lineno + 1 in (7, 9)  # of the expression that spans them
    assert Path(caught.traceback[-1].path).name == "small.py"
    assert made.first.__code__.co_firstlineno == 4


SMALL = "import torch\nprint(torch.cuda.is_available(), 'cuda:0')\n"
COMPILE = f"""
from megapsft.platform.cpu import _Loader
print("{STANDIN}" in _Loader("small", "small.py").get_code("small").co_names)
"""


@pytest.fixture
def compiled(tmp_path):
    """Compiles a small module in a process of its own; the files of its cache, with the time each was written."""
    (tmp_path / "small.py").write_text(SMALL)
    home = tmp_path / "cache"
    home.mkdir()

    def run() -> dict[Path, int]:
        done = python(COMPILE, cwd=tmp_path, XDG_CACHE_HOME=str(home))
        assert done.stdout.splitlines() == ["True"]
        return {path: path.stat().st_mtime_ns for path in home.rglob("*.code")}

    return run


def test_code_is_compiled_once_and_cached(compiled):
    first = compiled()
    assert len(first) == 1
    assert compiled() == first  # not written anew


def test_a_changed_source_is_compiled_anew(compiled, tmp_path):
    first = compiled()
    (tmp_path / "small.py").write_text(SMALL + "print(torch.cuda)\n")
    assert len(compiled().keys() - first.keys()) == 1


@pytest.mark.parametrize("damaged", [lambda whole: b"", lambda whole: b"not code", lambda whole: whole[:20]])
def test_a_damaged_cache_is_replaced(damaged, compiled):
    (path,) = compiled()
    whole = path.read_bytes()
    path.write_bytes(damaged(whole))
    compiled()
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(compiled, tmp_path):
    (tmp_path / "cache/megapsft").write_text("a file where the folder should be: not even root can write into it")
    assert compiled() == {}


def test_a_cache_that_is_read_only_is_read(compiled, tmp_path):
    first = compiled()
    folder = next(iter(first)).parent
    folder.chmod(0o500)
    assert compiled() == first
    (tmp_path / "small.py").write_text(SMALL + "print(torch.cuda)\n")
    compiled()
    folder.chmod(0o700)


def test_caches_of_python_are_left_to_the_true_source(compiled, tmp_path):
    """A process without the hook would read them."""
    compiled()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "small.py"]


def python(code: str, fails: bool = False, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr
    return done
