"""A data set in a folder is the one that was written, sample for sample; a folder that is not whole is refused."""

import dataclasses
import json

import numpy as np
import pytest

from megapsft.config import DataConfig
from megapsft.data import mapped
from megapsft.data.arithmetic import generate, preferences, rollouts, write_jsonl
from megapsft.data.demonstrations import load_demonstrations
from megapsft.data.preferences import load_preferences
from megapsft.data.rollouts import load_rollouts
from megapsft.errors import Refused
from megapsft.types import Sample

COUNT = 20
PROBLEMS = generate(COUNT, 0)
ROLLOUTS = list(rollouts(PROBLEMS, 0, 3))
PAIR = {"prompt": "2 + 3?", "chosen": "5", "rejected": "6", "chosen_ref_logprobs": None, "rejected_ref_logprobs": None}
IDS = {"token_ids": [40, 41, 2], "logprobs": [-0.5, -1.25, -0.0], "reward": 0.3, "weight_version": 4}


def with_logprobs(chatml) -> list[dict]:
    """Preferences that bring log-probabilities of the reference."""
    lengths = {side: len(chatml.encode(PAIR["prompt"], PAIR[side])[0]) for side in ("chosen", "rejected")}
    prompt = chatml.encode(PAIR["prompt"], "5")[1]
    return [PAIR | {f"{side}_ref_logprobs": [-0.1] * (length - prompt) for side, length in lengths.items()}]


CASES = {
    "demonstrations": ([{"prompt": row["question"], "demonstration": row["answer"]} for row in PROBLEMS], {}),
    "dropped and in words of all alphabets": (
        [{"prompt": "Wie groß ist π? 答えは", "demonstration": "3,14 …"}, {"prompt": "1", "demonstration": "long " * 400}], {},
    ),
    "truncated": ([{"prompt": "1", "demonstration": "long " * 400}], {"overlong": "truncate"}),
    "preferences": (list(preferences(PROBLEMS, 0)), {}),
    "preferences with log-probabilities": (with_logprobs, {}),
    "rollouts": (ROLLOUTS, {}),
    "rollouts with log-probabilities": ([{"prompt": "2 + 3?", "rollouts": [IDS, IDS], "demonstration": "5"}], {}),
    "the best rollouts": (ROLLOUTS, {"select": "raft"}),
}  # fmt: skip
KINDS = {"rollouts": "rollouts", "chosen": "preferences", "demonstration": "demonstrations"}  # column -> kind
LOADERS = {"demonstrations": load_demonstrations, "preferences": load_preferences, "rollouts": load_rollouts}


@pytest.fixture
def load(chatml, tmp_path):
    def load(case: str):
        rows, options = CASES[case]
        rows = rows(chatml) if callable(rows) else rows
        write_jsonl(tmp_path / "rows.jsonl", rows)
        kind = next(kind for column, kind in KINDS.items() if column in rows[0])
        config = DataConfig(path=str(tmp_path / "rows.jsonl"), kind=kind, **({"max_length": 256} | options))
        return LOADERS[kind](config, chatml, 512)

    return load


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mapped").mkdir()
    return tmp_path / "mapped"


def same(a, b) -> bool:
    """Whether two data sets are of one kind and all their fields are equal, in type too."""
    fields = [field.name for field in dataclasses.fields(a) if field.name != "groups"]
    plain = type(a) is type(b) and all(equal(getattr(a, name), getattr(b, name)) for name in fields)
    return plain and [len(group) for group in a.groups] == [len(group) for group in b.groups] and all(
        equal(getattr(left, field.name), getattr(right, field.name))
        for left, right in zip(a.samples, b.samples, strict=True)
        for field in dataclasses.fields(Sample)
    )  # fmt: skip


def equal(a, b) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_was_written(case, load, folder):
    dataset = load(case)
    mapped.write(dataset, folder)
    found = mapped.read(folder)
    assert same(found, dataset)
    assert found.notes == dataset.notes
    assert (found.response_tokens, found.prompt_tokens) == (dataset.response_tokens, dataset.prompt_tokens)


def test_the_cases_have_all_that_files_can_hold(load):
    found = [sample for case in CASES for sample in load(case).samples]
    for name in ("rollout_logprobs", "ref_logprobs"):
        assert {getattr(sample, name) is None for sample in found} == {True, False}
    assert {sample.demonstration for sample in found} == {True, False}
    assert len({sample.reward for sample in found}) > 2
    assert all(sample.advantage == 0 and sample.routed_experts is None for sample in found)  # which are not kept


def test_groups_are_a_sequence_of_views(load, folder):
    dataset = load("rollouts")
    mapped.write(dataset, folder)
    groups = mapped.read(folder).groups
    assert len(groups) == COUNT
    ids = [[sample.token_ids.tolist() for sample in group] for group in dataset.groups]
    assert [[sample.token_ids.tolist() for sample in group] for group in groups] == ids
    assert [sample.token_ids.tolist() for sample in groups[-1]] == ids[-1]
    assert [[sample.token_ids.tolist() for sample in group] for group in groups[3:9:2]] == ids[3:9:2]
    with pytest.raises(IndexError):
        groups[COUNT]
    assert type(groups[0][0].token_ids) is np.ndarray
    with pytest.raises(ValueError, match="read-only"):
        groups[0][0].token_ids[0] = 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def shorten(path):
    np.save(path, np.load(path)[:-1])


def pickle_it(path):
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


ARRAYS = ["token_ids", "loss_mask", "demonstration", "reward", "source", "tokens_before", "bytes_before", "samples_before"]
DAMAGE = [
    *((f"{name}.npy", change) for name in ARRAYS for change in (cut, shorten, pickle_it, lambda path: path.unlink())),
    ("dataset.json", lambda path: path.unlink()),
    ("dataset.json", lambda path: path.write_text("{")),
    ("dataset.json", lambda path: path.write_text("[]")),
    ("dataset.json", lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "Prompts"}))),
    ("dataset.json", lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"fields": {"rows": 1}}))),
    ("dataset.json", lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"arrays": ["token_ids"]}))),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGE)
def test_a_folder_that_is_not_whole_is_refused(file, damage, load, folder):
    mapped.write(load("rollouts"), folder)
    damage(folder / file)
    with pytest.raises(Refused) as refusal:
        mapped.read(folder)
    assert refusal.value.value == str(folder)
    assert "is not whole" in refusal.value.rule
    assert "delete this folder" in refusal.value.remedy
