"""Recorded rollouts, from the file to groups of samples. Not here: reading of files (test_rows), selection (test_select)."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megapsft.config import ColumnsConfig, DataConfig
from megapsft.data.arithmetic import generate, rollouts, write_jsonl
from megapsft.data.rollouts import load_rollouts
from megapsft.errors import Refused

RIGHT, WRONG = {"response": "2 + 3 = 5", "reward": 1.0}, {"response": "2 + 3 = 6 apples", "reward": 0}
ROW = {"prompt": "What is 2 + 3?", "rollouts": [RIGHT, WRONG], "demonstration": "Five."}
BARE = {key: value for key, value in ROW.items() if key != "demonstration"}


@pytest.fixture
def load(chatml, tmp_path):
    def load(*rows, vocab_size=512, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_rollouts(DataConfig(path=str(path), kind="rollouts", **options), chatml, vocab_size)

    return load


def refused(load, *rows, **options) -> Refused:
    with pytest.raises(Refused) as refusal:
        load(*rows, **options)
    return refusal.value


def only(**changes) -> dict:
    """BARE with one rollout, changed."""
    return BARE | {"rollouts": [RIGHT | changes]}


def test_a_row_is_a_group_and_its_demonstration_comes_last(load, chatml):
    found = load(ROW, BARE)
    assert [len(group) for group in found.groups] == [3, 2]
    assert [(s.reward, s.demonstration) for s in found.groups[0]] == [(1.0, False), (0.0, False), (1.0, True)]
    for sample, text in zip(found.groups[0], (RIGHT["response"], WRONG["response"], "Five."), strict=True):
        token_ids, prompt_length = chatml.encode(ROW["prompt"], text)
        assert sample.token_ids.tolist() == token_ids.tolist()
        assert sample.loss_mask.tolist() == [False] * prompt_length + [True] * (len(token_ids) - prompt_length)
        assert (sample.token_ids.dtype, sample.rollout_logprobs) == (np.int32, None)
    assert [s.source.rpartition(":1: ")[2] for s in found.groups[0]] == ["rollout 1", "rollout 2", "demonstration"]


def test_counts(load):
    cut, alone = only(finish_reason="length"), only()
    found = load(ROW, BARE | {"rollouts": [RIGHT, RIGHT]}, cut, alone | {"demonstration": "5"})
    counts = (found.rows, found.dropped, found.truncated, found.rollouts, found.overlong, found.unfinished, found.demonstrations)
    assert counts == (4, 0, 0, 6, 0, 1, 2)
    assert (found.singletons, found.equal, found.selected) == (1, 2, None)
    assert found.notes == (
        "6 rollouts, 1 of them cut by the engine, and 2 demonstrations.",
        "2 of 4 groups have equal rewards and 1 one member: rewards say nothing there.",
    )
    assert load(ROW).notes == ("2 rollouts, 0 of them cut by the engine, and 1 demonstrations.",)


def test_the_reward_of_a_demonstration(load):
    assert load(ROW | {"demonstration_reward": 0.5}).groups[0][-1].reward == 0.5
    refusal = refused(load, BARE | {"demonstration_reward": 0.5})
    assert "rewards a demonstration that the row has not" in refusal.rule


@pytest.mark.parametrize("words", [{}, {"response": "what they say, to be read"}])
def test_token_ids_are_used_as_they_are(words, load, chatml):
    ids = [70, 70, 71, 72]  # no tokenizer would write these, and they have no terminator
    (group,) = load(BARE | {"rollouts": [{"token_ids": ids, "reward": 1} | words, RIGHT], "prompt_token_ids": [5, 6]}).groups
    assert group[0].token_ids.tolist() == [5, 6, *ids]
    assert group[0].loss_mask.tolist() == [False] * 2 + [True] * 4
    assert group[1].token_ids.tolist()[:2] == [5, 6]
    assert group[1].token_ids[-1] == chatml.terminator_id
    (without,) = load({"prompt_token_ids": [5, 6], "rollouts": [RIGHT]}).groups
    assert without[0].token_ids.tolist() == group[1].token_ids.tolist()


def test_a_response_that_was_cut_has_no_terminator(load, chatml):
    ((whole,),), ((cut,),) = load(only(finish_reason="stop")).groups, load(only(finish_reason="length")).groups
    assert whole.token_ids[-1] == chatml.terminator_id
    assert cut.token_ids.tolist() == whole.token_ids[:-1].tolist()


def test_a_finished_response_may_be_empty_and_a_cut_one_not(load, chatml):
    ((sample,),) = load(only(response="")).groups
    assert sample.token_ids[sample.loss_mask].tolist() == [chatml.terminator_id]
    assert "has a response without tokens" in refused(load, only(response="", finish_reason="length")).rule


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_a_terminator_inside_of_a_response_is_refused(load, finish_reason):
    refusal = refused(load, only(response="5<|im_end|> or 6", finish_reason=finish_reason))
    assert "has the turn terminator <|im_end|> before its end" in refusal.rule
    assert "rows.jsonl:1: rollout 1" in refusal.value


def test_log_probabilities_lie_at_their_tokens(load):
    ((plain,),) = load(only()).groups
    values = [-0.5 - i for i in range(int(plain.loss_mask.sum()))]
    ((rollout, demonstration),) = load(only(logprobs=values) | {"demonstration": "Five."}).groups
    assert rollout.rollout_logprobs.dtype == np.float32
    assert rollout.rollout_logprobs[rollout.loss_mask].tolist() == values
    assert not rollout.rollout_logprobs[~rollout.loss_mask].any()
    assert demonstration.rollout_logprobs.tolist() == [0.0] * len(demonstration)
    ((cut,),) = load(only(logprobs=values), max_length=len(rollout) - 2, overlong="truncate").groups
    assert cut.rollout_logprobs.tolist() == rollout.rollout_logprobs[:-2].tolist()


def test_log_probabilities_of_some_or_of_other_tokens_are_refused(load):
    length = int(load(only()).groups[0][0].loss_mask.sum())
    good = RIGHT | {"logprobs": [-1.0] * length}
    for rows, value, rule in (
        ((BARE | {"rollouts": [good, WRONG]},), "rows.jsonl:1: rollout 2", "rows.jsonl:1: rollout 1 has"),
        ((BARE, BARE | {"rollouts": [good]}), "rows.jsonl:1: rollout 1", "rows.jsonl:2: rollout 1 has"),
        ((only(logprobs=[-1.0] * (length - 1)),), "rollout 1", f"has {length - 1} logprobs for {length} response tokens"),
        ((only(logprobs=[None] * length),), "rollout 1: 'logprobs'", "is not a list of numbers"),
        ((only(logprobs=[float("-inf")] * length),), "'logprobs', entry 1", "is -inf"),
    ):
        refusal = refused(load, *rows)
        assert value in refusal.value
        assert rule in refusal.rule


def test_an_overlong_rollout_is_dropped_alone_and_an_empty_group_with_it(load):
    long = {"response": "2 + 3 = 6 " * 40, "reward": 0}
    found = load(BARE | {"rollouts": [RIGHT, long]}, BARE | {"rollouts": [long, long]}, ROW, max_length=60)
    assert [len(group) for group in found.groups] == [1, 3]
    assert (found.rows, found.dropped, found.overlong, found.truncated) == (3, 1, 3, 0)
    assert "3 of 6 rollouts dropped: too long." in found.notes
    cut = load(BARE | {"rollouts": [RIGHT, long]}, max_length=60, overlong="truncate")
    assert ([len(s) for s in cut.groups[0]][1], cut.truncated, cut.overlong) == (60, 1, 0)
    assert "rows.jsonl:1: rollout 2" in refused(load, BARE | {"rollouts": [RIGHT, long]}, max_length=60, overlong="error").value
    assert "drops all 1 rows" in refused(load, BARE | {"rollouts": [long]}, max_length=60).rule


def test_rft_keeps_each_that_is_good_enough(load):
    half = {"response": "about 5", "reward": 0.5}
    rows = (ROW | {"rollouts": [WRONG, RIGHT, half, RIGHT]}, BARE | {"rollouts": [WRONG]})
    found = load(*rows, select="rft")
    assert [[s.source[-9:] for s in group] for group in found.groups] == [["rollout 2"], ["rollout 4"]]
    assert [s.demonstration for s in found.samples] == [False, False]
    assert (found.rows, found.dropped, found.not_selected, found.selected, found.demonstrations) == (2, 1, 1, 2, 0)
    assert found.notes[-1] == "2 of 5 rollouts selected (40.0%); 1 of 2 prompts have none."
    assert [s.reward for s in load(*rows, select="rft", select_threshold=0.5).samples] == [1.0, 0.5, 1.0]
    assert [s.source[-9:] for s in load(*rows, select="rft", dedupe=True).samples] == ["rollout 2"]


def test_raft_keeps_the_best_of_each_prompt(load):
    found = load(ROW | {"rollouts": [WRONG, RIGHT, RIGHT]}, BARE | {"rollouts": [WRONG]}, select="raft")
    assert [s.source.rpartition("rows.jsonl:")[2] for s in found.samples] == ["1: rollout 2", "2: rollout 1"]


def test_options_of_selection_that_nothing_reads_are_refused(load):
    assert refused(load, ROW, select="raft", select_threshold=0.5).value == "data.select_threshold=0.5"
    assert refused(load, ROW, dedupe=True).value == "data.dedupe=True"
    assert "keeps none of the rollouts" in refused(load, BARE | {"rollouts": [WRONG]}, select="rft").rule


def test_weight_versions_are_said(load):
    found = load(BARE | {"rollouts": [RIGHT | {"weight_version": v} for v in (7, 3, 7)]})
    assert found.weight_versions == (3, 7)
    assert found.notes[-1] == "the rollouts are of 2 weight versions (3..7)."


@pytest.mark.parametrize(
    ("row", "value", "rule"),
    [
        ({"prompt": "q"}, "column 'rollouts'", "is missing"),
        (BARE | {"prompt": " "}, "column 'prompt'", "is empty or blank"),
        ({"rollouts": [RIGHT]}, "column 'prompt'", "is missing"),
        (BARE | {"rollouts": []}, "column 'rollouts'", "is an empty list"),
        (BARE | {"rollouts": "5"}, "column 'rollouts'", "is a str"),
        (BARE | {"rollouts": ["5"]}, "rollout 1", "is a str"),
        (BARE | {"rollouts": [RIGHT, {"reward": 1}]}, "rollout 2", "has neither a response nor token_ids"),
        (BARE | {"rollouts": [{"response": "5"}]}, "rollout 1", "has no reward"),
        (only(reward=float("nan")), "rollout 1: reward=nan", "is not a finite number"),
        (only(reward=float("inf")), "rollout 1: reward=inf", "is not a finite number"),
        (only(reward=True), "rollout 1: reward=True", "is not a finite number"),
        (only(reward="1"), "rollout 1: reward='1'", "is not a finite number"),
        (only(response=5), "rollout 1: 'response'", "is a int"),
        (only(response="\ud800"), "rollout 1: 'response'", "half a surrogate pair"),
        (only(log_probs=[]), "rollout 1: 'log_probs'", "is not a field of a rollout"),
        (only(finish_reason="abort"), "rollout 1: finish_reason='abort'", "is not known"),
        (only(weight_version=1.5), "rollout 1: weight_version=1.5", "is not an integer"),
        (BARE | {"rollouts": [{"token_ids": [], "reward": 1}]}, "'token_ids'", "is not a list of token ids"),
        (BARE | {"rollouts": [{"token_ids": [-1], "reward": 1}]}, "'token_ids'", "is not a list of token ids"),
        (BARE | {"rollouts": [{"token_ids": [2**31], "reward": 1}]}, "'token_ids'", "is not a list of token ids"),
        (BARE | {"rollouts": [{"token_ids": ["5"], "reward": 1}]}, "'token_ids'", "is not a list of token ids"),
        (BARE | {"rollouts": [{"token_ids": [512], "reward": 1}]}, "rollout 1", "holds token 512"),
        (BARE | {"prompt_token_ids": []}, "column 'prompt_token_ids'", "is not a list of token ids"),
        (BARE | {"prompt_token_ids": [600]}, "rows.jsonl:2", "holds token 600"),
        (BARE | {"demonstration": 5}, "column 'demonstration'", "is a int"),
        (BARE | {"demostration": "Five."}, "column 'demonstration'", "is misspelt 'demostration'"),
        (ROW | {"demonstration_reward": "1"}, "column 'demonstration_reward'", "is not a finite number"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(load, row, value, rule):
    refusal = refused(load, ROW, row)
    assert "rows.jsonl:2" in refusal.value
    assert value in refusal.value
    assert rule in refusal.rule


def test_an_image_in_a_recorded_prompt_is_refused_and_what_a_policy_sampled_is_not(load, chatml):
    chatml.media_token_ids = frozenset([9])
    sampled = {"prompt_token_ids": [5, 6], "rollouts": [{"token_ids": [9], "reward": 1}]}
    assert load(sampled).rollouts == 1
    refusal = refused(load, sampled, sampled | {"prompt_token_ids": [5, 9]})
    assert refusal.value.endswith("rows.jsonl:2")
    assert "stands for an image or a video" in refusal.rule


def test_a_system_prompt_is_not_put_before_token_ids(load):
    assert load(ROW, system_prompt="Think.").groups[0][0].token_ids.tolist() != load(ROW).groups[0][0].token_ids.tolist()
    refusal = refused(load, {"prompt_token_ids": [5], "rollouts": [RIGHT]}, system_prompt="Think.")
    assert refusal.value == "data.system_prompt='Think.'"


def test_columns_can_have_other_names(load):
    columns = ColumnsConfig(prompt="question", rollouts="answers", demonstration="solution")
    row = {"question": ROW["prompt"], "answers": ROW["rollouts"], "solution": "Five."}
    assert len(load(row, columns=columns).groups[0]) == 3
    refusal = refused(load, {"question": "q", "answers": [RIGHT]}, columns=columns)
    assert (refusal.value, "column of no row" in refusal.rule) == ("data.columns.demonstration=solution", True)


def test_parquet_is_as_good(load, chatml, tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [ROW | {"rollouts": [RIGHT, WRONG | {"finish_reason": "length"}]}, BARE]
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = load_rollouts(DataConfig(path=str(path), kind="rollouts"), chatml, 512)
    assert [s.token_ids.tolist() for s in found.samples] == [s.token_ids.tolist() for s in load(*rows).samples]


def test_made_up_rollouts_load(chatml, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", rollouts(generate(40, seed=0), seed=0, each=4))
    found = load_rollouts(DataConfig(path=str(tmp_path / "rows.jsonl"), kind="rollouts"), chatml, 512)
    assert [len(group) for group in found.groups] == [5] * 40
    assert 0 < found.equal < 20  # the all wrong ones are not equal: the demonstration is right
    chosen = load_rollouts(DataConfig(path=str(tmp_path / "rows.jsonl"), kind="rollouts", select="rft"), chatml, 512)
    assert chosen.selected == sum(s.reward for s in found.samples if not s.demonstration)
