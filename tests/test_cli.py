"""The command line, in this process where no environment matters, else as a user starts it.

Not here: training and exporting from the command line (tests/test_docs.py, tests/e2e), messages (tests/test_errors.py).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from megapsft.checkpoint.hf import read_config
from megapsft.cli import COMMANDS, CONVERT, main
from megapsft.models.families import parameter_count
from megapsft.policy.backend import choose_backend
from tests.command import megapsft

TP = "parallel.tensor_model_parallel_size"


@pytest.fixture
def config(tiny_models, tiny_data, tmp_path) -> Path:
    """A config file, complete; the run goes to `run` beside it."""
    tree = {
        "run": {"dir": "run"},
        "model": {"path": str(tiny_models("qwen3")), "dtype": "float32"},
        "data": {"path": str(tiny_data), "columns": {"prompt": "question", "demonstration": "answer"}, "pack_length": 512},
        "train": {"steps": 1, "batch_size": 8, "minibatch_size": 4},
        "log": {"tensorboard": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_every_option(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert re.search(rf"For example:\s.*megapsft {command}", text, re.DOTALL)
    assert "usage: megapsft" in text


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("conversion", CONVERT)
def test_help_of_the_conversions_and_of_their_scripts(conversion, capsys):
    with pytest.raises(SystemExit) as done:
        main(["convert", conversion, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert re.search(rf"For example:\s.*megapsft convert {conversion}", text, re.DOTALL)
    script = Path(__file__).parents[1] / "tools/convert" / (conversion.replace("-", "_") + ".py")
    run = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert (run.returncode, run.stdout.splitlines()[0]) == (0, text.splitlines()[0])


def test_help_of_the_installed_command():
    done = megapsft("train", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "megapsft train configs/psft/tiny-qwen3-gsm8k.yaml" in done.stdout


@pytest.mark.parametrize("arguments", [["tarin"], ["train"], ["train", "a.yaml", "--dryrun"], ["export", "run"], []])
def test_a_wrong_command_line_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert capsys.readouterr().out == ""


def test_a_dry_run_starts_nothing_and_says_everything(config, tiny_models):
    done = megapsft("train", str(config), "--dry-run", "train.steps=7", f"{TP}=2", cwd=config.parent)
    assert (done.returncode, done.stderr) == (0, "")
    resolved = yaml.safe_load(done.stdout.partition("\n\n")[0])
    assert resolved["train"]["steps"] == 7
    assert resolved["optimizer"]["adam_beta2"] == 0.999  # defaults too
    assert resolved["objective"]["clip_high"] == 0.28  # and those of the objective
    parameters = parameter_count(read_config(tiny_models("qwen3")))
    stored = load_file(tiny_models("qwen3") / "model.safetensors")
    assert parameters == sum(tensor.numel() for tensor in stored.values())
    for text in (
        f"Qwen3ForCausalLM, {parameters:,} parameters, 4 layers",
        "{}: {}".format(*choose_backend("auto")),
        "2 process(es): tp=2 dp=1",
        "64 of 64 rows (0 dropped, 0 truncated)",
        "12,022 tokens, 5,372 of them trained",
        "7 of psft; 2 update(s) a step; from the beginning",
        "8 samples a step, 4 an update",
        "microbatches on each of 1 data-parallel rank(s), up to",
        "positions filled",
        "train 1e-06 to 1e-06",
    ):
        assert text in done.stdout
    assert [path.name for path in config.parent.iterdir()] == ["config.yaml"]


def test_a_dry_run_under_torchrun_starts_nothing_either(config):
    """And the plan is printed by the first rank only."""
    done = megapsft("train", str(config), "--dry-run", cwd=config.parent, RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in config.parent.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [["train.steps=7", "FILE"], ["FILE", "train.steps=7"], ["train.steps=6", "FILE", "train.steps=7"]],
    ids=["before", "after", "around"],
)
def test_overrides_may_stand_anywhere(arguments, config, capsys):
    assert main(["config", *[str(config) if a == "FILE" else a for a in arguments]]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["steps"] == 7


def test_overrides_of_one_call_are_gone_in_the_next(config, capsys):
    assert main(["config", str(config), "train.steps=7"]) == 0
    capsys.readouterr()
    assert main(["config", str(config)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["steps"] == 1


def test_a_path_with_an_equals_sign_is_a_path(config, capsys):
    folder = config.parent / "lr=1e-3"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.read_text())
    assert main(["config", str(folder / "config.yaml")]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["batch_size"] == 8


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ("0", "megapsft: --nproc-per-node 0: must be 1 or more; leave it out for as many as the split needs\n"),
        ("3", "megapsft: world size 3: must be a multiple of tensor 2 x pipeline 1 x context 1 = 2; start 2 processes, or a "
              "multiple (--nproc-per-node 2)\n"),
    ],
)  # fmt: skip
def test_a_number_of_processes_that_cannot_be(processes, message, config, capsys):
    assert main(["train", str(config), "--nproc-per-node", processes, f"{TP}=2"]) == 2
    assert capsys.readouterr().err == message
    assert [path.name for path in config.parent.iterdir()] == ["config.yaml"]


def test_data_and_a_model_from_nothing(tmp_path, capsys):
    data, model = tmp_path / "data/train.jsonl", tmp_path / "model"
    assert main(["make-data", "--out", str(data), "--count", "32"]) == 0
    assert capsys.readouterr().out == f"wrote 32 problems to {data}\n"
    assert len(data.read_text().splitlines()) == 32
    options = ["--num-layers", "2", "--hidden-size", "32"]
    command = ["init-model", "--family", "qwen3", "--data", str(data), *options, "--out", str(model)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"made {model}\n"
    assert (read_config(model).num_hidden_layers, read_config(model).hidden_size) == (2, 32)
    assert main(command) == 2
    message = f"megapsft: {model}: exists and is not an empty folder; name another folder, or delete this one\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("arguments", "columns", "members"),
    [
        ([], {"question", "answer"}, None),
        (["--kind", "preferences"], {"prompt", "chosen", "rejected"}, None),
        (["--kind", "rollouts"], {"prompt", "rollouts", "demonstration"}, 4),
        (["--kind", "rollouts", "--rollouts-per-prompt", "7", "--from", "FILE"], {"prompt", "rollouts", "demonstration"}, 7),
    ],
)
def test_made_data_is_what_its_kind_says(arguments, columns, members, tiny_data, tmp_path):
    arguments = [str(tiny_data) if argument == "FILE" else argument for argument in arguments]
    assert main(["make-data", "--out", str(tmp_path / "rows.jsonl"), "--count", "9", *arguments]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 9
    assert all(set(row) == columns for row in rows)
    assert members is None or all(len(row["rollouts"]) == members for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rollouts-per-prompt", "4"], "is not read where --kind demonstrations"),
        (["--kind", "rollouts", "--rollouts-per-prompt", "0"], "must be 1 or more"),
        (["--count", "0"], "--count 0: must be 1 or more"),
    ],
)
def test_data_that_cannot_be_made(arguments, words, tmp_path, capsys):
    assert main(["make-data", "--out", str(tmp_path / "rows.jsonl"), *arguments]) == 2
    assert words in capsys.readouterr().err
