"""What an audit says is trained is what the loaders hand to training. Not here: what is wrong with it."""

import numpy as np
import pytest

from megapsft.audit.roles import ROLES
from megapsft.audit.rows import audit_rows, read_records
from megapsft.data.arithmetic import generate, preferences, rollouts
from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.objectives.registry import build_objective
from megapsft.train.prepare import with_advantages
from megapsft.train.sources import load_dataset
from tests.audit.conftest import VOCABULARY


def rows_of(kind):
    problems = generate(60, 2)
    if kind == "preferences":
        rows = list(preferences(problems, 0))
        rows[3]["rejected"] = rows[3]["chosen"]
        return rows
    if kind == "rollouts":
        return list(rollouts(problems, 0, each=3))
    names = {"demonstrations": "demonstration", "prompts": "demonstration"}
    return [{"prompt": row["question"], names[kind]: row["answer"], "reference": row["answer"]} for row in problems]


CASES = [
    ("demonstrations", "sft", []),
    ("demonstrations", "sft", ["data.max_length=150"]),
    ("demonstrations", "sft", ["data.max_length=100", "data.overlong=truncate", "data.system_prompt=Be brief."]),
    ("demonstrations", "sft", ["data.limit=7"]),
    ("preferences", "dpo", []),
    ("preferences", "dpo", ["data.max_length=150"]),
    ("preferences", "dpo", ["data.max_length=150", "data.overlong=truncate"]),
    ("rollouts", "grpo", []),
    ("rollouts", "srft", ["data.max_length=150"]),
    ("rollouts", "hpt", ["data.max_length=150", "data.overlong=truncate"]),
    ("rollouts", "sft", ["data.select=rft", "data.dedupe=true"]),
    ("rollouts", "sft", ["data.select=raft", "data.max_length=170"]),
    ("prompts", "srft", ["data.max_length=170", "rollout.max_tokens=64", "rewards=[{name: math_answer}]"]),
]


@pytest.mark.parametrize(("kind", "objective", "overrides"), CASES, ids=lambda value: str(value))
def test_the_groups_are_those_of_the_loader(kind, objective, overrides, config_of, template):
    config = config_of(rows_of(kind), f"data.kind={kind}", f"objective.name={objective}", *overrides)
    minimised = build_objective(config.objective)
    groups = load_dataset(config, template, VOCABULARY).groups
    if kind != "prompts":  # what of those is trained is not known before they are answered
        groups = with_advantages(groups, minimised)
    rows = audit_rows(read_records(config.data), config, minimised, template, VOCABULARY)
    ours = [group for row in rows for group in row.groups(config.data)]
    assert len(ours) == len(groups) > 5
    for own, theirs in zip(ours, groups, strict=True):
        assert len(own) == len(theirs)
        for one, other in zip(own, theirs, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert one.loss_mask.tolist() == other.loss_mask.tolist()
            assert (one.demonstration, one.reward) == (other.demonstration, other.reward)


def test_every_refused_row_is_there_with_what_the_loader_says(clean, config_of, template):
    clean[2]["prompt"], clean[5]["demonstration"] = "", "Yes.<|im_end|> No."
    del clean[9]["demonstration"]
    config = config_of(clean)
    rows = list(audit_rows(read_records(config.data), config, build_objective({"name": "sft"}), template, VOCABULARY))
    assert [row.number for row in rows] == list(range(1, 41))
    refused = {row.number: row.refused for row in rows if row.refused}
    assert list(refused) == [3, 6, 10]
    with pytest.raises(Refused) as stopped:
        load_dataset(config, template, VOCABULARY)
    assert refused[10] == str(stopped.value)
    assert "is empty or blank" in refused[3]
    assert "before its end" in refused[6]
    assert rows[5].samples[0].loss_mask.sum() == 0


@pytest.mark.parametrize("kind", ["demonstrations", "rollouts"])
def test_a_prompt_with_an_image_is_refused_as_by_the_loader(kind, clean, config_of, template):
    """Of a model that sees images; "<image>" stands for its token where a file has token ids."""
    (image,) = template.tokenise(["#"])[0]
    seeing = ChatTemplate(template.tokenizer, media_token_ids=[image])
    clean[4]["prompt"] += " <image>"
    if kind == "rollouts":
        ids = [template.tokenise([row["prompt"].replace("<image>", "#")])[0] for row in clean]
        clean = [{"prompt_token_ids": one, "rollouts": [{"response": "Yes.", "reward": 1}]} for one in ids]
    config = config_of(clean, f"data.kind={kind}", *(["objective.name=grpo"] if kind == "rollouts" else []))
    rows = audit_rows(read_records(config.data), config, build_objective(config.objective), seeing, VOCABULARY)
    refused = {row.number: row.refused for row in rows if row.refused}
    with pytest.raises(Refused, match="stands for an image or a video") as stopped:
        load_dataset(config, seeing, VOCABULARY)
    assert refused == {5: str(stopped.value)}


def test_a_column_that_the_first_row_lacks_is_refused_at_once(clean, config_of):
    with pytest.raises(Refused, match="column 'question'"):
        read_records(config_of(clean, "data.columns.prompt=question").data)


def test_tokens_have_the_role_of_who_wrote_them(config_of, template):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  What is 2 + 3? "},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "And 5 more?"},
    ]
    config = config_of([{"prompt": turns, "demonstration": "It is 10."}])
    (row,) = audit_rows(read_records(config.data), config, build_objective({"name": "sft"}), template, VOCABULARY)
    (sample,) = row.samples
    said = {}
    for role in ROLES:
        said[role] = template.spell(sample.token_ids[sample.roles == ROLES.index(role)].tolist())
    assert said["system"] == "Be brief."
    assert said["user"].strip() == "What is 2 + 3?And 5 more?"
    assert said["assistant"] == "5"
    assert said["response"] == "It is 10."
    assert said["terminator"] == "<|im_end|>"
    assert said["template"].count("<|im_start|>") == 5
    assert np.array_equal(sample.loss_mask, np.isin(sample.roles, [ROLES.index("response"), ROLES.index("terminator")]))
