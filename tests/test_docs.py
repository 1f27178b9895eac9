"""What the documents say, done: commands run as they are printed, examples are copied out and tested, tables are compared.

Not here: `make quickstart` (tests/e2e/test_quickstart.py), `make test` (this suite), and several machines.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megapsft import cli
from megapsft.audit.across import RULES_ACROSS
from megapsft.audit.rules import ROW_RULES
from megapsft.config import Config, flatten, load_config
from megapsft.data.arithmetic import generate, preferences, read_problems, rollouts, write_jsonl
from megapsft.metrics.names import METRICS
from megapsft.platform.cpu import has_cuda
from megapsft.train.phases import phases
from tests.command import megapsft
from tests.shipped import TINY

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SMALL = "train.batch_size=8 train.minibatch_size=4 train.sft_warmup_steps=1 train.steps="
PSFT = "megapsft train configs/psft/tiny-qwen3-gsm8k.yaml data.path=gsm8k-train.jsonl"
SFT = "-m megapsft.cli train configs/sft/tiny-qwen3-gsm8k.yaml data.path=gsm8k-train.jsonl"
RUN = {  # every command that is run, in this order, and what is put behind it to make it small
    "megapsft init-model --family qwen3 --data gsm8k-train.jsonl --out models/tiny": "",
    f"{PSFT} --dry-run": "",
    PSFT: SMALL + "1",
    PSFT.replace("train", "audit", 1) + " --html audit.html": "",
    "megapsft curves runs/psft-tiny-qwen3-gsm8k --out curves.png": "",
    "megapsft report runs/psft-tiny-qwen3-gsm8k --out report.html": "",
    "megapsft export runs/psft-tiny-qwen3-gsm8k --out exports/tiny": "",
    "megapsft convert hf-to-megatron --hf models/tiny --out converted/tiny": "",
    f"{PSFT} model.path=converted/tiny run.dir=runs/converted": SMALL + "1",
    "megapsft convert megatron-to-hf --megatron runs/converted --out exports/converted --dtype bf16": "",
    "megapsft convert verify --hf exports/converted --against runs/converted --logits": "",
    f"{PSFT} train.steps=40 parallel.tensor_model_parallel_size=2": SMALL + "2",
    f"torchrun --nproc-per-node 2 {SFT}": "train.batch_size=8 train.minibatch_size=8 train.steps=1",
    "megapsft make-data --kind preferences --from gsm8k-train.jsonl --out preferences.jsonl": "",
    "megapsft train configs/dpo/tiny-qwen3-preferences.yaml data.path=preferences.jsonl": "train.batch_size=4 "
    "train.minibatch_size=4 train.steps=2",
    "megapsft make-data --kind rollouts --from gsm8k-train.jsonl --out rollouts.jsonl": "",
    "megapsft train configs/grpo/tiny-qwen3-rollouts.yaml data.path=rollouts.jsonl": "train.batch_size=4 train.steps=1",
    "megapsft make-data --level easy --count 8000 --out arithmetic.jsonl": "",
    "megapsft init-model --family qwen3 --data arithmetic.jsonl --vocab-size 320 --hidden-size 128 "
    "--num-layers 3 --head-dim 32 --intermediate-size 384 --out models/easy": "",
    "megapsft train configs/psft/tiny-qwen3-arithmetic.yaml model.path=models/easy": "train.sft_warmup_steps=2 train.steps=1",
    "megapsft export runs/psft-tiny-qwen3-arithmetic --out models/arithmetic": "",
    "megapsft train configs/grpo/tiny-qwen3-arithmetic.yaml": "train.steps=1",
    "megapsft evaluate --model models/arithmetic --data arithmetic.jsonl --limit 100 --n 8 --max-tokens 24 "
    "--out evaluations/before": "",
    "megapsft rollout --model models/arithmetic --data arithmetic.jsonl --limit 100 --n 4 --max-tokens 24 "
    "--out rollouts-of-mine.jsonl": "",
    "megapsft plan configs/psft/qwen3-30b-a3b.yaml --nodes 4 --gpus-per-node 8 --gpu h100": "",
    "megapsft submit configs/psft/qwen3-30b-a3b.yaml --nodes 4 --cluster configs/cluster/example.yaml --dry-run": "",
    PSFT.replace("train", "probe", 1): "train.batch_size=8 train.minibatch_size=4",
    "python -m tests.oracles tests/oracles/vectors.json": "",
    "python -m tests.invariants": "--kind dense --split 'microbatches of 2'",
    "python benchmarks/train_step.py": "--help",
    "python benchmarks/head.py": "--help",
    "python benchmarks/convert.py": "--help",
    "python benchmarks/rollout.py": "--help",
    "python benchmarks/rl.py": "--help",
    "python benchmarks/gpu.py": "--help",
}
ELSEWHERE = {
    "make quickstart": "tests/e2e/test_quickstart.py runs what it runs",
    "make test": "is this suite",
    "megapsft train configs/grpo/tiny-qwen3-arithmetic.yaml rollout.engine=sglang run.dir=runs/grpo-sglang": "test_rl_sglang.py",
    f"srun --nodes 2 --ntasks-per-node 8 python {SFT}": "needs Slurm; behind srun it is the torchrun command, compared below",
}


def commands(text: str) -> list[str]:
    """The lines of all ```bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line.split("  #")[0].split(" #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_of_the_readme_is_known_here():
    assert set(commands(README)) == {*RUN, *ELSEWHERE}
    assert len(commands(README)) == len(RUN) + len(ELSEWHERE)


def test_the_commands_of_the_readme_run(tiny_data, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(tiny_data, tmp_path / "gsm8k-train.jsonl")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, behind in RUN.items():
        where = ROOT if command.startswith("python ") else tmp_path  # those look at the repository, and write nothing
        done = subprocess.run(
            ["bash", "-c", f"{command} {behind}"], cwd=where, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"$ {command} {behind}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    run = tmp_path / "runs/psft-tiny-qwen3-gsm8k"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 1, 2, 2, 3, 3]  # the warm-up, a step, and the one that continued
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "exports/tiny/config.json").is_file()
    for name in ("config.yaml", "revision.txt", "model", "checkpoints", "tensorboard", "metrics.jsonl", "steps.jsonl"):
        assert f"`{name}" in README
        assert (run / name).exists()
    assert readme_metrics() == {key: METRICS[key] for key in records[-1] if "/" in key}
    assert {key for key in records[-1] if "/" not in key} == {"update", "step", "phase", "objective"}


def test_the_commands_of_planning_run(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    lines = commands((ROOT / "docs/planning.md").read_text())
    assert len(lines) == 3
    for line in lines:
        done = megapsft(*line.split()[1:], cwd=tmp_path)
        assert done.returncode == 0, f"$ {line}\n{done.stdout}\n{done.stderr}"
        assert re.search(r"fits: [\d.]+ of [\d.]+ GiB; .* tokens/s", done.stdout)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"]
    assert plan["mesh"]["world_size"] == 16
    assert plan["peak_bytes"] == max(stage["total"] for stage in plan["stages"])
    assert all(one["overrides"] and one["fits"] for one in plan["proposals"])


def test_the_commands_of_sweeps_are_ready_to_run(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "configs/cluster/example.yaml", tmp_path / "my.yaml")
    lines = [line for line in commands((ROOT / "docs/sweep.md").read_text()) if not line.endswith("--dry-run")]
    assert len(lines) == 2
    for line in lines:
        done = megapsft(*line.split()[1:], "--dry-run", cwd=tmp_path)
        assert done.returncode == 0, f"$ {line}\n{done.stdout}\n{done.stderr}"
        assert re.search(r"planned for h100 at the speed of tuned runs", done.stdout)
    assert not (tmp_path / "sweeps").exists()


def test_the_commands_of_the_cluster_page_are_ready_to_run(tmp_path):
    """Those that submit, as a dry run; a pipeline's data would have to be here, and nemo-run."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "configs/cluster/example.yaml", tmp_path / "my.yaml")
    lines = [line for line in commands((ROOT / "docs/cluster.md").read_text()) if line.startswith("megapsft submit")]
    lines = [line for line in lines if not line.endswith("--dry-run") and "configs/pipelines" not in line]
    lines = [line for line in lines if "--via" not in line]
    assert len(lines) == 3
    for line in lines:
        done = megapsft(*line.split()[1:], "--dry-run", cwd=tmp_path)
        assert done.returncode == 0, f"$ {line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=megapsft-")
    assert not (tmp_path / "runs").exists()


def test_the_commands_of_profiling_are_ready_to_run(tiny_models, tiny_data, tmp_path, monkeypatch, capsys):
    """Those of nsys need CUDA; what they start is refused without it."""
    monkeypatch.chdir(ROOT)
    here = [f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}", f"run.dir={tmp_path / 'run'}", "--dry-run"]
    lines = commands((ROOT / "docs/profiling.md").read_text())
    curves, *trained, nsys = lines
    assert curves in RUN
    assert len(trained) == 2
    for line, shown in zip(trained, ("steps 2 to 3 of rank(s) 0", "steps 4 to 5 of all ranks"), strict=True):
        assert cli.main([*line.split()[1:], *here]) == 0
        assert f"{shown}: traces in" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert cli.main([*nsys.split("megapsft ")[1].split(), *here]) == (0 if has_cuda() else 2)
    assert ("needs CUDA" in capsys.readouterr().err) == (not has_cuda())


def test_the_commands_of_the_audit_page_run(tiny_data, tmp_path, tiny_models, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    shutil.copytree(tiny_models("qwen3"), "models/tiny")
    shutil.copy(tiny_data, "gsm8k-train.jsonl")
    write_jsonl("gsm8k-test.jsonl", generate(5, 7))
    write_jsonl("preferences.jsonl", preferences(read_problems(tiny_data), 0))
    lines = commands((ROOT / "docs/audit.md").read_text())
    assert len(lines) == 3
    for line in lines:
        assert cli.main(line.split()[1:]) == 0, line
        assert "no warnings" in capsys.readouterr().out
    assert Path("audit.html").is_file()
    assert json.loads(Path("audit.json").read_text())["kind"] == "preferences"


def test_the_audit_page_has_every_rule():
    table = (ROOT / "docs/audit.md").read_text().split("<!-- rules -->")[1].split("<!-- end of rules -->")[0]
    rules = [f"| `{rule.name}` | {rule.meaning} | {rule.remedy} |" for rule in (*ROW_RULES, *RULES_ACROSS)]
    assert table.strip().splitlines()[2:] == rules


def test_make_has_the_targets_that_are_named():
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"^make ([a-z0-9-]+)", text, re.M)) | set(re.findall(r"`make ([a-z0-9-]+)", text))
    assert {"quickstart", "test", "venv", "invariants", "oracles", "docs"} <= named
    for target in named | {"clean", "help"}:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_srun_starts_what_torchrun_starts():
    behind = [command.split("-m megapsft.cli")[1] for command in (*RUN, *ELSEWHERE) if "-m megapsft.cli" in command]
    assert len(behind) == 2
    assert behind[0] == behind[1]


def test_examples_of_configs_load(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "example.yaml").write_text(block)
        assert phases(load_config(tmp_path / "example.yaml"))


def test_the_example_of_a_conversion_runs(tiny_models, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/conversion.md").read_text(), re.DOTALL)
    shutil.copytree(tiny_models("qwen3_moe"), tmp_path / "Qwen3-30B-A3B")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["report"].equal == names["report"].tensors == 135


@pytest.fixture(scope="module")
def rows(tiny_data, tmp_path_factory):
    """A file for each data.kind."""
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "preferences.jsonl", preferences(read_problems(tiny_data), 0))
    write_jsonl(folder / "rollouts.jsonl", rollouts(read_problems(tiny_data), 0, each=2))
    kinds = {kind: folder / f"{kind}.jsonl" for kind in ("preferences", "rollouts")} | {"prompts": tiny_data}
    return kinds | {"demonstrations": tiny_data}


@pytest.mark.parametrize("path", TINY, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configs_are_ready_to_run(path, rows, tiny_models, tmp_path, capsys):
    family = "qwen3_moe" if "moe" in path.stem or path.stem == "quickstart" else "qwen3"
    config = load_config(path)
    here = [f"model.path={tiny_models(family)}", f"data.path={rows[config.data.kind]}", f"run.dir={tmp_path / 'run'}"]
    if path.stem == "tiny-rollouts":  # a parent of others, which say the objective
        here.append("objective.name=grpo")
    assert cli.main(["train", str(path), "--dry-run", *here]) == 0
    assert "learning rate" in capsys.readouterr().out  # the last row of the plan
    assert not (tmp_path / "run").exists()


def test_keys_that_scripts_may_rely_on_are_there():
    section = README.split("## What scripts may rely on")[1].split("All keys")[0]
    known = flatten(Config())
    for key in re.findall(r"`([a-z_.]+\.[a-z_]+)`", section):
        assert key in known, key
    names = {field.name for field in dataclasses.fields(Config().parallel)}
    assert {"tensor_model_parallel_size", "expert_model_parallel_size"} <= names


@pytest.mark.parametrize(("function", "page"), [("page", "configuration.md"), ("metrics_page", "metrics.md")])
def test_generated_pages_are_what_would_be_generated(function, page):
    code = f"import runpy; print(runpy.run_path('docs/generate.py')['{function}'](), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs" / page).read_text(), "run make docs"


def test_the_worked_objective_of_contributing(tmp_path):
    for folder in ("megapsft", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    files = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert len(files) == 2
    for name, text in files:
        (tmp_path / name).write_text(text)
    names = [name for name, _ in files]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "ruff", "check", *names], cwd=tmp_path, check=True)
    test = ["-m", "pytest", "-p", "no:cacheprovider", names[1], "tests/objectives/test_contract.py", "-k", "focal"]
    done = subprocess.run([sys.executable, *test], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 10  # its own two, and the contract's


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], target


def readme_metrics() -> dict[str, str]:
    """key -> meaning, of the table in the README."""
    rows = re.findall(r"^\| `([a-z_]+/[a-z0-9_]+)` \| (.+) \|$", README, re.M)
    assert len(rows) == len(dict(rows))
    return dict(rows)
