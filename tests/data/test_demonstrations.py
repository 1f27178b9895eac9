"""Not tested here: reading (test_rows) and tokenising (test_chat_template)."""

import dataclasses

import numpy as np
import pytest

from megapsft.config import ColumnsConfig, DataConfig
from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.data.demonstrations import load_demonstrations
from megapsft.errors import Refused


@pytest.fixture
def config(tmp_path) -> DataConfig:
    write_jsonl(tmp_path / "rows.jsonl", generate(40, seed=5))
    return DataConfig(path=str(tmp_path / "rows.jsonl"), columns=ColumnsConfig(prompt="question", demonstration="answer"))


@pytest.fixture
def load(config, chatml):
    def load(vocab_size=512, **changes):
        return load_demonstrations(dataclasses.replace(config, **changes), chatml, vocab_size)

    return load


def median_length(demonstrations) -> int:
    return sorted(map(len, demonstrations.samples))[len(demonstrations.samples) // 2]


def test_every_row_is_a_sample_in_order(load, config):
    found = load()
    assert (found.rows, found.dropped, found.truncated) == (40, 0, 0)
    assert [sample.source for sample in found.samples] == [f"{config.path}:{line}" for line in range(1, 41)]


def test_the_mask_is_the_response_with_its_terminator(load, chatml):
    for sample in load().samples:
        response = chatml.tokenizer.decode(sample.token_ids[sample.loss_mask])
        prompt = chatml.tokenizer.decode(sample.token_ids[~sample.loss_mask])
        assert response.endswith("<|im_end|>")
        assert "####" in response
        assert prompt.endswith("<|im_start|>assistant\n")
        assert np.all(np.diff(sample.loss_mask.astype(int)) >= 0)
        assert sample.loss_mask.dtype == bool


def test_token_totals(load):
    found = load()
    assert found.response_tokens == sum(sample.loss_mask.sum() for sample in found.samples)
    assert found.prompt_tokens == sum((~sample.loss_mask).sum() for sample in found.samples)


def test_the_longest_allowed_length_is_kept(load):
    longest = max(map(len, load().samples))
    assert load(max_length=longest, overlong="error").dropped == 0


def test_drop(load):
    whole = load()
    limit = median_length(whole)
    found = load(max_length=limit, overlong="drop")
    kept = [sample.source for sample in whole.samples if len(sample) <= limit]
    assert [sample.source for sample in found.samples] == kept
    assert (found.rows, found.dropped, found.truncated) == (40, 40 - len(kept), 0)


def test_truncate_cuts_the_response_and_makes_up_no_terminator(load, chatml):
    whole = load()
    limit = median_length(whole)
    found = load(max_length=limit, overlong="truncate")
    assert found.truncated == sum(len(sample) > limit for sample in whole.samples) > 0
    for before, after in zip(whole.samples, found.samples, strict=True):
        assert after.token_ids.tolist() == before.token_ids[:limit].tolist()
        assert after.loss_mask.tolist() == before.loss_mask[:limit].tolist()
        assert (after.token_ids[-1] == chatml.terminator_id) == (len(before) <= limit)


def test_truncate_drops_a_row_whose_prompt_leaves_no_room(load):
    whole = load().samples
    prompts = [int((~sample.loss_mask).sum()) for sample in whole]
    limit = sorted(prompts)[20]
    found = load(max_length=limit, overlong="truncate")
    assert found.dropped == sum(prompt >= limit for prompt in prompts)
    assert found.truncated == sum(p < limit < len(sample) for p, sample in zip(prompts, whole, strict=True)) > 0
    assert all(sample.loss_mask.any() for sample in found.samples)


def test_one_response_token_is_room_enough(load):
    prompt = min(int((~sample.loss_mask).sum()) for sample in load().samples)
    found = load(max_length=prompt + 1, overlong="truncate")
    assert min(int(sample.loss_mask.sum()) for sample in found.samples) == 1


def test_error_names_the_row_and_its_length(load, config):
    whole = load()
    longest = max(map(len, whole.samples))
    line = next(sample.source for sample in whole.samples if len(sample) == longest)
    with pytest.raises(Refused, match=f"has {longest} tokens, above data.max_length={longest - 1}") as refusal:
        load(max_length=longest - 1, overlong="error")
    assert refusal.value.value == line


def test_nothing_left_is_refused(load):
    with pytest.raises(Refused, match="drops all 40 rows"):
        load(max_length=3)


def test_limit(load):
    assert load(limit=3).rows == 3


def test_the_embedding_must_have_a_row_for_every_token(load):
    largest = max(int(sample.token_ids.max()) for sample in load().samples)
    assert load(vocab_size=largest + 1).rows == 40
    with pytest.raises(Refused, match=f"tokenizer of 512 tokens: vocabulary larger than the embedding.*its {largest} rows"):
        load(vocab_size=largest)
