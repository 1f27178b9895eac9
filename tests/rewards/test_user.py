"""Rewards of the user's own. Not here: workers that are killed (test_pool.py)."""

from pathlib import Path

import pytest

from megapsft.errors import Refused
from megapsft.rewards._base import Response
from megapsft.rewards.registry import build_reward, build_rewards
from megapsft.rewards.sum import summary

WORKERS = str(Path(__file__).with_name("workers.py"))
RESPONSE = Response(
    prompt=[{"role": "user", "content": "?"}],
    text="four",
    tokens=1,
    source="train.jsonl:7",
    row={"answer": "four", "difficulty": 3},
)


def total(entry, response=RESPONSE):
    with build_rewards([entry]) as rewards:
        return rewards([response])[0].total


def test_a_function_in_a_file_with_its_own_options():
    assert total({"name": f"{WORKERS}:length", "weight": 0.5, "scale": 3}) == 6.0


def test_it_sees_the_prompt_and_the_row():
    assert total({"name": f"{WORKERS}:of_row"}) == 4.0


def test_a_file_alone_means_its_function_reward(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/brevity.py").write_text("def reward(prompt, response, row):\n    return 1 / len(response)\n")
    monkeypatch.chdir(tmp_path)
    label, _ = build_reward({"name": "mine/brevity.py"})
    assert label == "brevity"
    assert total({"name": "mine/brevity.py"}) == 0.25


def test_a_dotted_path_is_found_where_python_finds_it_here(tmp_path, monkeypatch):
    (tmp_path / "judges_of_mine").mkdir()
    (tmp_path / "judges_of_mine/strict.py").write_text(
        "class Judge:\n    pass\n\ndef judge(prompt, response, row):\n    return True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert total({"name": "judges_of_mine.strict:judge"}) == 1.0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('no problem 9')", "failed: ValueError: no problem 9 (own.py, line 2)"),
        ("return None", "failed: TypeError: returned NoneType, not a number"),
        ("return float('inf')", "failed: ValueError: returned inf, which is not finite"),
        ("return '1'", "failed: TypeError: returned str, not a number"),
        ("return row['answr']", "failed: KeyError: 'answr'"),
    ],
)
def test_what_it_must_not_do_stops_the_run_and_names_the_row(body, said, tmp_path):
    (tmp_path / "own.py").write_text(f"def reward(prompt, response, row):\n    {body}\n")
    with pytest.raises(Refused) as refused:
        total({"name": str(tmp_path / "own.py")})
    assert f"own.py:reward of train.jsonl:7: {said}" in str(refused.value)


def test_one_that_never_returns_is_counted():
    with build_rewards([{"name": f"{WORKERS}:endless", "timeout": 0.5}, {"name": "length"}]) as rewards:
        scored = rewards([RESPONSE] * 2)
    assert [one.total for one in scored] == [0.0, 0.0]
    assert summary(scored)["reward/timeouts"] == 2
    assert summary(scored)["reward/deaths"] == 0


@pytest.mark.parametrize(
    ("source", "name", "options", "said"),
    [
        ("def reward(prompt, response):\n    return 1\n", "own.py", {}, "too many positional arguments"),
        ("def reward(prompt, response, row, scale):\n    return 1\n", "own.py", {}, "missing a required argument: 'scale'"),
        ("def reward(prompt, response, row):\n    return 1\n", "own.py", {"scale": 2}, "unexpected keyword argument 'scale'"),
        ("def other(prompt, response, row):\n    return 1\n", "own.py", {}, "no attribute 'reward'"),
        ("reward = 3\n", "own.py", {}, "3 is not a callable object"),
        ("import nothing_of_the_kind\n", "own.py", {}, "No module named 'nothing_of_the_kind'"),
        ("def reward(\n", "own.py", {}, "SyntaxError"),
        ("import os\nos._exit(4)\n", "own.py", {}, "its process ended, with exit code 4"),
        ("", "gone.py", {}, "is not a file"),
        ("", "gone.py:reward", {}, "is not a file"),
        ("", "nowhere_at_all:reward", {}, "No module named 'nowhere_at_all'"),
    ],
)
def test_what_cannot_be_called_is_refused_at_the_door(source, name, options, said, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused) as refused:
        build_rewards([{"name": name, "label": "mine"} | options])
    assert said in str(refused.value)
