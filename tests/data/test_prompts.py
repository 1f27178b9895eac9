"""Not tested here: reading (test_rows) and tokenising (test_chat_template)."""

import dataclasses
import json

import pytest

from megapsft.config import ColumnsConfig, DataConfig
from megapsft.data.prompts import load_prompts
from megapsft.errors import Refused

ROWS = [
    {"question": "What is 2 plus 2?", "answer": "2 + 2 = 4\n#### 4", "level": 1},
    {"question": "What is 3 plus 4?", "answer": "3 + 4 = 7\n#### 7", "level": 2},
    {"question": "What is 5 plus 4?", "answer": None, "level": 3},
]


@pytest.fixture
def load(tmp_path, chatml):
    def load(rows=ROWS, max_tokens=16, vocab_size=512, **changes):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = changes.pop("columns", ColumnsConfig(prompt="question", reference="answer"))
        config = DataConfig(path=str(tmp_path / "rows.jsonl"), kind="prompts", columns=columns)
        return load_prompts(dataclasses.replace(config, **changes), chatml, vocab_size, max_tokens)

    return load


def test_a_row_is_its_prompt_with_what_it_is_measured_by(load, chatml):
    data = load()
    assert (data.rows, data.dropped, data.demonstrations) == (3, 0, 0)
    for row, given in zip(data.prompts, ROWS, strict=True):
        assert chatml.tokenizer.decode(row.token_ids) == chatml.render_prompt(given["question"])
        assert (row.prompt, row.reference, dict(row.row)) == (given["question"], given["answer"], given)
    for group, row in zip(data.groups, data.prompts, strict=True):
        assert tuple(group[0].token_ids) == row.token_ids
        assert not group[0].loss_mask.any()
    assert data.response_tokens == 0


def test_a_demonstration_stands_behind_its_prompt(load, chatml):
    columns = ColumnsConfig(prompt="question", reference="answer", demonstration="answer")
    data = load(columns=columns)
    assert data.demonstrations == 2
    assert "2 of 3 prompts have a demonstration" in data.notes[0]
    first = data.prompts[0].demonstration
    expected, prompt_length = chatml.encode(ROWS[0]["question"], ROWS[0]["answer"])
    assert first.token_ids.tolist() == expected.tolist()
    assert first.loss_mask.sum() == len(expected) - prompt_length
    assert first.demonstration
    assert first.reward == 1
    assert not first.rollout_logprobs.any()
    assert data.groups[0] == (first,)
    assert data.prompts[2].demonstration is None


def test_a_number_is_a_reference(load):
    assert load([{"question": "What?", "answer": 113}]).prompts[0].reference == "113"
    with pytest.raises(Refused, match="column 'answer': is a list"):
        load([{"question": "What?", "answer": [1]}])


def test_a_prompt_without_room_is_dropped_or_refused(load):
    lengths = [len(row.token_ids) for row in load([ROWS[0], {"question": "What is 2 plus 2? " * 5, "answer": "4"}]).prompts]
    rows = [ROWS[0], {"question": "What is 2 plus 2? " * 5, "answer": "4"}]
    data = load(rows, max_length=lengths[0] + 16)
    assert len(data.prompts) == 1
    assert data.dropped == 1
    assert "1 of 2 prompts dropped" in data.notes[0]
    with pytest.raises(Refused, match=f"has {lengths[1] + 16} tokens"):
        load(rows, max_length=lengths[0] + 16, overlong="error")
    with pytest.raises(Refused, match=f"use {lengths[1] + 16}, or fewer rollout.max_tokens"):
        load(rows, max_length=lengths[0])
    with pytest.raises(Refused, match="cuts responses"):
        load(rows, overlong="truncate")


def test_missing_columns_are_named(load):
    with pytest.raises(Refused, match="column 'prompt': is missing; the row has: question, answer, level"):
        load(columns=ColumnsConfig(reference="answer"))
    with pytest.raises(Refused, match="data.columns.reference=solution: is a column of no row"):
        load(columns=ColumnsConfig(prompt="question", reference="solution"))
    with pytest.raises(Refused, match="embedding"):
        load(vocab_size=100)
