"""Not tested here: reading of files (test_rows), what a template does (test_chat_template)."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megapsft.config import ColumnsConfig, DataConfig
from megapsft.data.preferences import load_preferences
from megapsft.errors import Refused

PAIR = {"prompt": "What is 2 + 3?", "chosen": "2 + 3 = 5", "rejected": "2 + 3 = 6 apples"}
LONG = PAIR | {"rejected": "2 + 3 = 6 " * 40}


@pytest.fixture
def load(chatml, tmp_path):
    def load(*rows, vocab_size=512, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_preferences(DataConfig(path=str(path), kind="preferences", **options), chatml, vocab_size)

    return load


def refused(load, *rows, **options) -> Refused:
    with pytest.raises(Refused) as refusal:
        load(*rows, **options)
    return refusal.value


def lengths(load) -> tuple[int, int]:
    """Response tokens of both sides of PAIR."""
    ((chosen, rejected),) = load(PAIR).groups
    return int(chosen.loss_mask.sum()), int(rejected.loss_mask.sum())


def test_a_pair_is_a_group_of_chosen_and_rejected(load, chatml):
    found = load(PAIR, PAIR | {"chosen": "five"})
    assert (found.rows, found.dropped, found.truncated, found.identical, found.notes) == (2, 0, 0, 0, ())
    assert [len(group) for group in found.groups] == [2, 2]
    for sample, side in zip(found.groups[0], ("chosen", "rejected"), strict=True):
        token_ids, prompt_length = chatml.encode(PAIR["prompt"], PAIR[side])
        assert sample.token_ids.tolist() == token_ids.tolist()
        assert sample.loss_mask.tolist() == [False] * prompt_length + [True] * (len(token_ids) - prompt_length)
        assert (sample.demonstration, sample.ref_logprobs, sample.token_ids.dtype) == (True, None, np.int32)
        assert sample.source.endswith(f"rows.jsonl:1: {side}")
    assert found.response_tokens == sum(int(s.loss_mask.sum()) for group in found.groups for s in group)
    assert found.prompt_tokens == 4 * prompt_length


def test_messages_that_end_with_the_assistant_are_its_words(load):
    (plain,) = load(PAIR).groups
    asked = {"role": "user", "content": PAIR["prompt"]}
    words = {side: {"role": "assistant", "content": PAIR[side]} for side in ("chosen", "rejected")}
    whole = {side: [asked, words[side]] for side in words}
    for row in (
        PAIR | whole,
        PAIR | {side: [words[side]] for side in words},
        {"prompt": [asked], **whole},
        {"prompt": [asked], "chosen": whole["chosen"], "rejected": PAIR["rejected"]},
    ):
        (group,) = load(row).groups
        assert [sample.token_ids.tolist() for sample in group] == [sample.token_ids.tolist() for sample in plain]


@pytest.mark.parametrize(
    ("response", "rule"),
    [
        ([{"role": "user", "content": "What is 2 + 4?"}, {"role": "assistant", "content": "6"}], "has other turns"),
        ([{"role": "assistant", "content": "6"}, {"role": "assistant", "content": "6"}], "has other turns"),
        ([{"role": "user", "content": "What is 2 + 3?"}], "ends with a turn of 'user'"),
        ([{"role": "assistant", "content": " "}], "is empty or blank"),
        ([], "is an empty list"),
        ("", "is empty or blank"),
        (5, "is a int"),
        (None, "is a NoneType"),
    ],
)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_bad_response_is_refused_with_its_line(load, side, response, rule):
    refusal = refused(load, PAIR, PAIR | {side: response})
    assert rule in refusal.rule
    assert f"rows.jsonl:2: column '{side}'" in refusal.value


def test_the_same_tokens_on_both_sides_prefer_nothing(load):
    found = load(PAIR, PAIR | {"rejected": PAIR["chosen"]})
    assert (len(found.groups), found.rows, found.dropped, found.identical) == (1, 2, 1, 1)
    assert "1 of 2 pairs dropped: chosen and rejected are the same" in found.notes[0]
    assert "prefers nothing" in refused(load, PAIR | {"rejected": PAIR["chosen"]}).rule


def test_a_pair_with_an_overlong_side_is_dropped_whole(load):
    found = load(LONG, PAIR, max_length=60)
    assert (len(found.groups), found.rows, found.dropped, found.truncated) == (1, 2, 1, 0)
    assert "drops all 1 rows" in refused(load, LONG, max_length=60).rule


def test_truncate_cuts_the_side_that_is_too_long(load, chatml):
    (whole,), (cut,) = load(LONG).groups, load(LONG, max_length=60, overlong="truncate").groups
    assert cut[0].token_ids.tolist() == whole[0].token_ids.tolist()
    assert cut[1].token_ids.tolist() == whole[1].token_ids[:60].tolist()
    assert chatml.terminator_id not in cut[1].token_ids[cut[1].loss_mask]
    assert load(LONG, max_length=60, overlong="truncate").truncated == 1


def test_sides_that_differ_only_behind_the_cut_are_the_same(load):
    row = PAIR | {"chosen": "2 + 3 = 6 " * 40 + "or five", "rejected": LONG["rejected"]}
    found = load(row, PAIR, max_length=60, overlong="truncate")
    assert (len(found.groups), found.identical, found.truncated) == (1, 1, 0)


def test_error_names_the_row(load):
    refusal = refused(load, PAIR, LONG, max_length=60, overlong="error")
    assert "above data.max_length=60" in refusal.rule
    assert "rows.jsonl:2" in refusal.value


def test_log_probabilities_of_the_reference_lie_at_their_tokens(load):
    chosen, rejected = lengths(load)
    given = {"chosen_ref_logprobs": [-0.5 - i for i in range(chosen)], "rejected_ref_logprobs": [-1.0] * rejected}
    ((first, second),) = load(PAIR | given).groups
    assert first.ref_logprobs.dtype == np.float32
    assert first.ref_logprobs[first.loss_mask].tolist() == given["chosen_ref_logprobs"]
    assert second.ref_logprobs[second.loss_mask].tolist() == given["rejected_ref_logprobs"]
    assert not first.ref_logprobs[~first.loss_mask].any()
    length = len(first) - 1  # of the longest that is kept: the chosen side loses one token, the rejected one more
    cut = load(PAIR | given, max_length=length, overlong="truncate").groups[0][0]
    assert cut.ref_logprobs.tolist() == first.ref_logprobs[:length].tolist()


def test_log_probabilities_under_other_names(load):
    chosen, rejected = lengths(load)
    columns = ColumnsConfig(chosen_ref_logprobs="c", rejected_ref_logprobs="r")
    ((first, _),) = load(PAIR | {"c": [-1] * chosen, "r": [-2] * rejected}, columns=columns).groups
    assert first.ref_logprobs[-1] == -1
    refusal = refused(load, PAIR, columns=columns)
    assert (refusal.value, "column of no row" in refusal.rule) == ("data.columns.chosen_ref_logprobs=c", True)


def test_log_probabilities_that_do_not_fit_are_refused(load):
    chosen, rejected = lengths(load)
    good = PAIR | {"chosen_ref_logprobs": [-1.0] * chosen, "rejected_ref_logprobs": [-1.0] * rejected}
    for rows, value, rule in (
        ((good, PAIR), "rows.jsonl:2", "rows.jsonl:1 has"),
        ((PAIR, good), "rows.jsonl:1", "rows.jsonl:2 has"),
        ((good | {"rejected_ref_logprobs": None},), "rows.jsonl:1", "has 'chosen_ref_logprobs' alone"),
        ((good | {"chosen_ref_logprobs": [-1.0] * (chosen - 1)},), "'chosen_ref_logprobs'", f"for {chosen} response tokens"),
        ((good | {"rejected_ref_logprobs": [-1.0] * chosen},), "'rejected_ref_logprobs'", f"for {rejected} response tokens"),
        ((good | {"chosen_ref_logprobs": -3.5},), "'chosen_ref_logprobs'", "is not a list of numbers"),
        ((good | {"chosen_ref_logprobs": [None] * chosen},), "'chosen_ref_logprobs'", "is not a list of numbers"),
        ((good | {"chosen_ref_logprobs": [0.5] * chosen},), "entry 1", "is 0.5"),
        ((good | {"chosen_ref_logprobs": [-1.0] * (chosen - 1) + [float("nan")]},), f"entry {chosen}", "is nan"),
        ((good | {"chosen_ref_logprobs": [-1e39] * chosen},), "entry 1", "is -1e+39"),
    ):
        refusal = refused(load, *rows)
        assert value in refusal.value
        assert rule in refusal.rule


def test_parquet_is_as_good(load, chatml, tmp_path):
    path = tmp_path / "rows.parquet"
    messages = [{"role": "user", "content": PAIR["prompt"]}, {"role": "assistant", "content": PAIR["chosen"]}]
    columns = {"score": [3.0], "prompt": [PAIR["prompt"]], "chosen": [messages], "rejected": [PAIR["rejected"]]}
    pq.write_table(pa.table(columns), path)
    found = load_preferences(DataConfig(path=str(path), kind="preferences"), chatml, 512)
    assert [s.token_ids.tolist() for s in found.groups[0]] == [s.token_ids.tolist() for s in load(PAIR).groups[0]]


def test_refusals_of_columns_limits_and_the_embedding(load):
    assert "data.columns.rejected=NAME" in refused(load, {"prompt": "q", "chosen": "a"}).remedy
    assert load(PAIR, PAIR, limit=1).rows == 1
    largest = max(int(sample.token_ids.max()) for sample in load(PAIR).samples)
    assert "vocabulary larger than the embedding" in refused(load, PAIR, vocab_size=largest).rule
    assert refused(load, PAIR, select="rft").value == "data.select=rft"
