"""`megapsft rollout` and `evaluate` with the policy in the process, killed too. Through a server: tests/rollout/sglang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megapsft.cli import main
from megapsft.config import DataConfig
from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.rollouts import load_rollouts
from megapsft.rollout.base import Request, Sampling
from megapsft.rollout.recorded import Recorded
from tests.command import ROOT, megapsft

PROBLEMS, N = 12, 4
KINDS = {
    "evaluate": ["--n", str(N), "--k", "1,4"],
    "rollout": ["--n", str(N), "--reward", "math_answer"],
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "mine.jsonl"
    write_jsonl(path, generate(PROBLEMS, 3))
    return path


@pytest.fixture(scope="module")
def command(problems, tiny_models):
    """(kind, folder to write into) -> arguments of the command."""

    def command(kind: str, out: Path, *more: str) -> list[str]:
        to = out / "mine.jsonl" if kind == "rollout" else out
        return [kind, "--model", str(tiny_models("qwen3")), "--data", str(problems), "--out", str(to), "--max-tokens", "24",
                "--max-batch-size", "1", *KINDS[kind], *more]  # fmt: skip

    return command


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """kind -> (folder that an undisturbed run wrote, what it printed)."""
    made = {}

    def make(kind: str) -> tuple[Path, str]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            done = megapsft(*command(kind, folder))
            assert done.returncode == 0, done.stderr
            made[kind] = folder, done.stdout
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_started_again_it_asks_for_nothing_twice(kind, command, whole, tmp_path):
    folder, printed = whole(kind)
    path = tmp_path / "out" / "mine.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "megapsft.cli", *command(kind, tmp_path / "out")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                                    "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (path.is_file() and path.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = path.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    lines = before.count(b"\n")
    in_all = (folder / "mine.jsonl").read_bytes().count(b"\n")
    assert lines < in_all, "it ended before it could be killed"
    with path.open("ab") as file:
        file.write(b'{"row": 9, "numb')  # what a machine's end may leave

    again = megapsft(*command(kind, tmp_path / "out"))
    assert again.returncode == 0, again.stderr
    responses = PROBLEMS * N
    assert f"{responses} responses" in again.stdout
    assert f"{lines * responses // in_all} of them by an earlier attempt" in again.stdout
    after = path.read_bytes()
    assert after.startswith(before)
    assert after == (folder / "mine.jsonl").read_bytes()
    asked = [(record["row"], record["number"]) for record in map(json.loads, after.splitlines())]
    assert len(asked) == len(set(asked)) == in_all
    if kind == "evaluate":
        assert (tmp_path / "out/results.json").read_text() == (folder / "results.json").read_text()
        assert table(again.stdout) == table(printed)

    once_more = megapsft(*command(kind, tmp_path / "out"))
    assert once_more.returncode == 0, once_more.stderr
    assert f"{responses} responses" in once_more.stdout
    assert f"{responses} of them by an earlier attempt" in once_more.stdout
    assert path.read_bytes() == after


def table(printed: str) -> str:
    return printed.partition("wrote ")[0]


def test_the_table_is_what_the_responses_say(whole, tiny_models):
    folder, printed = whole("evaluate")
    results = json.loads((folder / "results.json").read_text())
    found = results["benchmarks"]["mine"]
    records = [json.loads(line) for line in (folder / "mine.jsonl").read_text().splitlines()]
    end = ChatTemplate.load(tiny_models("qwen3")).terminator_id
    lengths = [[0] * N for _ in range(PROBLEMS)]
    for record in records:
        (rollout,) = record["rollouts"]
        ids = rollout["token_ids"]
        lengths[record["row"]][record["number"]] = len(ids)
        assert rollout["finish_reason"] == ("stop" if ids[-1] == end else "length")
        assert end not in ids[:-1]
    assert found["lengths"] == lengths
    assert (found["n"], found["sampling"]["temperature"], found["sampling"]["top_p"]) == (N, 0.7, 0.95)
    metrics = results["metrics"]
    assert metrics["evaluate/mine/length"] == pytest.approx(sum(map(sum, lengths)) / (PROBLEMS * N))
    for text in (f"{metrics['evaluate/mine/length']:.1f} of 24", f"{metrics['evaluate/mine/unfinished']:.1%}", "pass@4", "±"):
        assert text in printed


def test_rollouts_can_be_trained_on_and_replayed(whole, problems, tiny_models):
    folder, _ = whole("rollout")
    path, template = folder / "mine.jsonl", ChatTemplate.load(tiny_models("qwen3"))
    loaded = load_rollouts(DataConfig(path=str(path), kind="rollouts"), template, 307)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    questions = [json.loads(line)["question"] for line in problems.read_text().splitlines()]
    assert [record["question"] for record in records] == questions
    assert [len(group) for group in loaded.groups] == [N] * PROBLEMS
    requests = [Request(prompt_ids=tuple(record["prompt_token_ids"]), number=i) for record in records for i in range(N)]
    replayed = Recorded(path).generate(requests, Sampling(max_tokens=24, stop_token_ids=template.stop_token_ids))
    for sample, rollout in zip(loaded.samples, replayed, strict=True):
        assert sample.token_ids.tolist() == [*rollout.prompt_ids, *rollout.response_ids]
        assert sample.rollout_logprobs[sample.loss_mask].tolist() == list(rollout.rollout_logprobs)


def test_several_benchmarks_each_with_its_own_numbers(problems, tiny_models, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(problems.read_text())
    done = megapsft(
        "evaluate", "--model", str(tiny_models("qwen3")), "--data", str(problems), str(other), "--n", "2", "4",
        "--limit", "3", "2", "--max-tokens", "4", "--k", "1,4", "--out", str(tmp_path / "out"), "--no-progress",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert {name: (len(one["scores"]), one["n"]) for name, one in found["benchmarks"].items()} == {
        "mine": (3, 2),
        "other": (2, 4),
    }
    assert "evaluate/other/pass@4" in found["metrics"]
    assert "evaluate/mine/pass@4" not in found["metrics"]
    assert "14 responses" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--temperature", "0.5"], "temperature=0.5: differs from the"),
        (["--seed", "1"], "seed=1: differs from the 0 that"),
        (["--limit", "3"], "problems=3: differs from the 12 that"),
        (["--system-prompt", "Be brief."], "prompts="),
        (["--dtype", "bfloat16"], "dtype='bfloat16': differs from the 'float32' that"),
    ],
)
def test_other_options_for_the_same_file_are_refused(kind, more, said, command, whole, capsys):
    folder, _ = whole(kind)
    before = (folder / "mine.jsonl").read_bytes()
    assert main(command(kind, folder, *more)) == 2
    assert said in capsys.readouterr().err
    assert (folder / "mine.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("rollout", ["--max-tokens", "5000"], "max_tokens=5000: and prompts of up to"),
        ("rollout", ["--temperature", "0"], "n=4: would be the same response"),
        ("rollout", ["--url", "http://127.0.0.1:1"], "is not read where --engine inprocess"),
        ("rollout", ["--tensor-parallel-size", "2"], "--tensor-parallel-size 2: is not read where --engine inprocess"),
        ("rollout", ["--reward", "math_anser"], "reward 'math_anser': is not known"),
        ("rollout", ["--prompt-column", "text"], "--prompt-column text: is not in every row of"),
        ("evaluate", ["--k", "1,8"], "k=8: must lie in 1..4"),
        ("evaluate", ["--k", "1;8"], "--k 1;8: is not a list of numbers"),
        ("evaluate", ["--n", "1", "2"], "--n 1 2: has 2 numbers for 1 files"),
        ("evaluate", ["--max-tokens", "5000"], "max_tokens=5000: and prompts of up to"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(kind, more, said, command, tmp_path, capsys):
    assert main(command(kind, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_columns_that_would_be_overwritten_are_refused(tiny_models, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "2 + 3?", "rollouts": []}\n')
    arguments = ["--model", str(tiny_models("qwen3")), "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "b.jsonl")]
    assert main(["rollout", *arguments]) == 2
    assert "column 'rollouts': is called as one that is written" in capsys.readouterr().err
