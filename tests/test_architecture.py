"""Who imports whom, read from the source: a package imports only from rows above it, and siblings never each other.

Also: each third party in the packages that need it, no absolute paths of a machine, no pickles. A violation names file, line
and rule. Not here: imports by computed names, such as the registry of objectives makes.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "megapsft"

ROWS = (
    ("errors",),
    ("types", "config", "output"),
    ("platform", "parallel", "metrics"),
    ("data", "rollout", "rewards", "advantages", "objectives", "models"),
    ("policy",),
    ("checkpoint",),
    ("train", "audit"),
    ("evaluate", "report", "cluster"),
    ("pipeline",),
    ("cli",),
)
ROW = {package: number for number, row in enumerate(ROWS) for package in row}

ONLY_IN = {  # third party -> the only packages that may import it
    "megatron": {"platform", "parallel", "models", "policy", "checkpoint", "train"},
    "wandb": {"metrics"},
    "tensorboard": {"metrics"},
    "torch.utils.tensorboard": {"metrics"},
    "matplotlib": {"report"},
    "transformers": {"data", "checkpoint"},
    "nemo_run": {"cluster"},
    "tyro": {"cli"},
    "httpx": {"rollout"},
}
NEVER_IN = {"torch": {"rewards", "advantages", "config"}}
ONLY_WITH = {  # beside what is Python's own
    "objectives": {"torch", "pydantic", "megapsft.types", "megapsft.errors", "megapsft.objectives"},
}
READS_PICKLES = Path("checkpoint/files/pickles.py")  # with a list of the classes that may be in them
WRITES_PICKLES = Path("rollout/sglang/shared_memory.py")  # for servers on loopback, whose protocol it is
EVERYWHERE_NEVER = {"pickle", "dill", "cloudpickle", "joblib", "ray"}
OF_A_MACHINE = re.compile(r"/(home|root|work|tmp|Users|mnt|media|scratch|lustre|gpfs|nfs|opt|srv|shared)(/|$)")


def test_the_house_stands():
    assert violations(ROOT) == []


def test_every_package_has_a_row():
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__"} <= set(ROW)


@pytest.mark.parametrize(
    ("file", "source", "rule"),
    [
        ("data/a.py", "import os\nfrom megapsft.policy import build", "data may not import policy"),
        ("data/a.py", "import os\nimport megapsft.models.rope", "data may not import models"),
        ("data/a.py", "import os\nfrom megapsft import models", "data may not import models"),
        ("data/a.py", "def f():\n    from megapsft.models import rope", "data may not import models"),
        ("data/a.py", "import os\nfrom ..models import rope", "write megapsft.models instead of a relative import"),
        ("errors.py", "import os\nimport megapsft.config", "errors may not import config"),
        ("types.py", "import os\nimport megapsft.config", "types may not import config"),
        ("cellar/a.py", "import os\nimport megapsft.config", "cellar has no row in tests/test_architecture.py"),
        ("data/a.py", "import os\nimport megapsft.cellar", "megapsft.cellar has no row in tests/test_architecture.py"),
        (
            "data/a.py",
            "import os\nfrom megatron.core import mpu",
            "megatron only in checkpoint, models, parallel, platform, policy, train",
        ),
        ("train/a.py", "import os\nfrom torch.utils import tensorboard", "torch.utils.tensorboard only in metrics"),
        ("policy/a.py", "import os\nimport wandb", "wandb only in metrics"),
        ("train/a.py", "import os\nimport matplotlib.pyplot as plt", "matplotlib only in report"),
        ("models/a.py", "import os\nimport transformers", "transformers only in checkpoint, data"),
        ("rewards/a.py", "import os\nimport torch.nn", "torch not in rewards"),
        ("config.py", "import os\nimport torch", "torch not in config"),
        ("objectives/a.py", "import os\nimport numpy", "objectives may not import numpy"),
        ("objectives/a.py", "import os\nfrom megapsft.config import Config", "objectives may not import config"),
        ("objectives/a.py", "import os\nfrom megapsft.models import rope", "objectives may not import models"),
        ("__init__.py", "import os\nimport megapsft.platform.cuda", "__init__.py may import platform.cpu only"),
        ("checkpoint/a.py", "import os\nimport pickle", "pickle nowhere"),
        ("rollout/a.py", "import os\nfrom multiprocessing.reduction import ForkingPickler", "pickle nowhere"),
        ("data/a.py", 'import os\nPATH = "/home/me/data.jsonl"', "'/home/me/data.jsonl' is a path of one machine"),
        ("checkpoint/a.py", "import torch\ntorch.load('x')", "torch.load reads pickles without weights_only=True"),
        ("checkpoint/a.py", "a\ntorch.load(x, weights_only=False)", "torch.load reads pickles without weights_only=True"),
    ],
)
def test_a_planted_violation_is_named(file, source, rule, tmp_path):
    path = tmp_path / "megapsft" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    (found,) = violations(tmp_path / "megapsft")
    assert found == f"{file}:2: {rule}"


def test_what_is_allowed_is_not_found(tmp_path):
    allowed = {
        "__init__.py": "from megapsft.platform.cpu import install",
        "cli/train.py": "import tyro\nfrom megapsft import parallel\nimport megapsft.train.loop",
        "objectives/a.py": "from __future__ import annotations\nimport json\nimport torch\nfrom megapsft.objectives import b\n"
        "from megapsft.errors import Refused\nimport megapsft.objectives",
        "metrics/a.py": "import wandb\nfrom torch.utils.tensorboard import SummaryWriter",
        str(READS_PICKLES): "import pickle\ntorch.load(x, weights_only=True)",
        "data/a.py": 'from megapsft.data.b import c\nimport transformers\nX = "a/tmp/b and/or c"',
    }
    for file, source in allowed.items():
        (tmp_path / "megapsft" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "megapsft" / file).write_text(source)
    assert violations(tmp_path / "megapsft") == []


def violations(root: Path) -> list[str]:
    """`file:line: rule` for every violation under `root`, the folder of the package."""
    found = []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        package = file.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            rules = dict.fromkeys(broken(package, node))
            if file in (READS_PICKLES, WRITES_PICKLES):
                rules.pop("pickle nowhere", None)
            found += [f"{file}:{node.lineno}: {rule}" for rule in rules]
    return found


def broken(package: str, node: ast.AST) -> Iterator[str]:
    """The rules that one node of a module of `package` breaks."""
    if isinstance(node, ast.ImportFrom) and node.level:
        yield f"write megapsft.{node.module or ''} instead of a relative import"
        return
    for name in imported(node):
        yield from broken_by_import(package, name)
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and OF_A_MACHINE.match(node.value):
        yield f"{node.value!r} is a path of one machine"
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if options.get("weights_only") != "True":
            yield "torch.load reads pickles without weights_only=True"


def imported(node: ast.AST) -> list[str]:
    """Dotted names that the node imports; `from a import b` imports a.b, which may be a module or a name in it."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def broken_by_import(package: str, name: str) -> Iterator[str]:
    top, *below = name.split(".")
    if top == "megapsft":
        yield from broken_row(package, name, below)
    for party, packages in ONLY_IN.items():
        if within(name, {party}) and package not in packages:
            yield f"{party} only in {', '.join(sorted(packages))}"
    for party, packages in NEVER_IN.items():
        if within(name, {party}) and package in packages:
            yield f"{party} not in {package}"
    if top in EVERYWHERE_NEVER:
        yield f"{top} nowhere"
    if within(name, {"multiprocessing.reduction"}):
        yield "pickle nowhere"
    allowed = ONLY_WITH.get(package)
    if allowed is not None and top not in sys.stdlib_module_names and not within(name, allowed):
        yield f"{package} may not import {below[0] if top == 'megapsft' and below else top}"


def broken_row(package: str, name: str, below: list[str]) -> Iterator[str]:
    if package == "__init__":
        if not within(name, {"megapsft.platform.cpu"}):
            yield "__init__.py may import platform.cpu only"
        return
    other = below[0] if below else package
    if other.startswith("__"):  # megapsft.__version__
        return
    for wanted, shown in ((package, package), (other, f"megapsft.{other}")):
        if wanted not in ROW:
            yield f"{shown} has no row in tests/test_architecture.py"
            return
    if other != package and ROW[other] >= ROW[package]:
        yield f"{package} may not import {other}"


def within(name: str, parents: set[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)
