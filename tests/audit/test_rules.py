"""Each fault planted in a row of its own, and found there by its rule. Not here: what only rows together show."""

import dataclasses

import numpy as np
import pytest

from megapsft.audit.rows import AuditedRow, AuditedSample, audit_rows, read_records
from megapsft.audit.rules import ROW_RULES, Context
from megapsft.data.arithmetic import generate, preferences, rollouts
from megapsft.data.chat_template import ChatTemplate
from megapsft.objectives.registry import build_objective
from tests.audit.conftest import VOCABULARY, found

ROW = 7  # where faults are planted; rows count from 1
END = "<|im_end|>"


def planted(rows, **columns):
    """The rows, with these columns in row ROW; a function gets what stood there."""
    old = rows[ROW - 1]
    rows[ROW - 1] = old | {name: value(old[name]) if callable(value) else value for name, value in columns.items()}
    return rows


TEXTS = [  # rule, columns of the row, what else is asked for
    ("two-terminators", {"demonstration": lambda text: text + END + END}, []),
    ("trained-prompt", {"demonstration": lambda text: "What is two and three, in all? " + text,
                        "prompt": "What is two and three, in all?"}, []),
    ("template-twice", {"prompt": lambda text: f"<|im_start|>user\n{text}"}, []),
    ("template-twice", {"demonstration": lambda text: f"<|im_start|>assistant\n{text}"}, []),
    ("template-twice", {"prompt": lambda text: f"[INST] {text} [/INST]"}, []),
    ("template-twice", {"prompt": lambda text: [{"role": "system", "content": "<|system|>"}, {"role": "user", "content": text}]},
     []),
    ("truncated", {"demonstration": lambda text: "Long. " * 60 + text}, ["data.max_length=256", "data.overlong=truncate"]),
    ("truncated", {"demonstration": "Half of it is \\boxed{\\frac{1}{2"}, []),
    ("dropped", {"demonstration": lambda text: "Long. " * 60 + text}, ["data.max_length=256"]),
    ("dropped", {"prompt": lambda text: "Long. " * 60 + text}, ["data.max_length=256", "data.overlong=truncate"]),
    ("refused", {"demonstration": lambda text: "Long. " * 60 + text}, ["data.max_length=256", "data.overlong=error"]),
    ("refused", {"demonstration": "  "}, []),
    ("refused", {"prompt": [{"role": "robot", "content": "?"}]}, []),
    ("think-unbalanced", {"demonstration": lambda text: f"<think>Hm. {text}"}, []),
    ("think-unbalanced", {"demonstration": lambda text: f"Hm.</think>{text}"}, []),
    ("think-unbalanced", {"demonstration": lambda text: f"<think>Hm.<think></think></think>{text}"}, []),
    ("no-final-answer", {"demonstration": "It is five."}, ["evaluate.data=[test.jsonl]"]),
    ("control-characters", {"prompt": lambda text: f"\u200b{text}"}, []),
    ("control-characters", {"demonstration": lambda text: f"\x1b[31m{text}"}, []),
    ("mojibake", {"prompt": lambda text: f"Don\u00e2\u20ac\u2122t. {text}"}, []),
    ("mojibake", {"demonstration": lambda text: f"Caf\u00c3\u00a9. {text}"}, []),
    ("mojibake", {"demonstration": lambda text: f"\ufffd {text}"}, []),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "columns", "overrides"), TEXTS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_fault_of_a_demonstration_is_found_in_its_row(rule, columns, overrides, clean, look):
    rules = found(look(planted(clean, **columns), *overrides))
    assert rules[rule] == [ROW]
    assert set(rules) <= {rule, "refused", "template-twice", "outlier", "truncated"}


def test_clean_rows_of_every_kind_give_no_warning(look):
    problems = generate(40, 1)
    asked = [{"prompt": row["question"], "reference": row["answer"]} for row in problems]
    for rows, overrides in (
        ([{"prompt": row["question"], "demonstration": row["answer"]} for row in problems], []),
        (list(preferences(problems, 0)), ["data.kind=preferences", "objective.name=dpo"]),
        (list(rollouts(problems, 0, each=3)), ["data.kind=rollouts", "objective.name=grpo"]),
        (list(rollouts(problems, 0, each=3)), ["data.kind=rollouts", "objective.name=sft", "data.select=rft"]),
        (asked, ["data.kind=prompts", "objective.name=grpo", "rewards=[{name: math_answer}]", "rollout.max_tokens=64"]),
    ):
        assert found(look(rows, *overrides)) == {}, overrides


def test_a_row_may_bring_its_own_terminator_and_its_whole_thoughts(clean, look):
    thought = planted(clean, demonstration=lambda text: f"<think>Hm.</think> {text}{END}")
    assert found(look(thought)) == {}


def test_a_pair_of_the_same_responses(look):
    rows = planted(list(preferences(generate(40, 1), 0)), chosen="It is 5.", rejected="It is 5.")
    assert found(look(rows, "data.kind=preferences", "objective.name=dpo")) == {"identical-pair": [ROW]}


ROLLOUTS = ["data.kind=rollouts", "objective.name=grpo", "data.max_length=512"]


def recorded(*responses):
    return {"rollouts": [{"reward": float(number)} | response for number, response in enumerate(responses)]}


def test_recorded_ids_without_a_terminator(look, template):
    ids = template.tokenise(["It is 5."])[0]
    whole = {"token_ids": [*ids, template.terminator_id]}
    rows = planted(list(rollouts(generate(40, 1), 0, each=2)), **recorded(whole, {"token_ids": ids}))
    rows[0] |= recorded(whole, {"token_ids": ids[:2], "finish_reason": "length"})  # the engine cut that one, and says so
    assert found(look(rows, *ROLLOUTS)) == {"missing-terminator": [ROW]}


def test_an_empty_response(look, template):
    rows = planted(list(rollouts(generate(40, 1), 0, each=2)), **recorded({"response": " "}, {"response": "5"}))
    rows[2] |= recorded({"token_ids": [template.terminator_id]}, {"response": "5"})
    assert found(look(rows, *ROLLOUTS)) == {"empty-response": [3, ROW]}


def test_logprobs_that_do_not_belong_to_the_response(look):
    rows = planted(list(rollouts(generate(40, 1), 0, each=2)), **recorded({"response": "5", "logprobs": [-0.5]}))
    assert found(look(rows, *ROLLOUTS)) == {"refused": [ROW]}


def test_ids_beyond_the_embedding(look):
    rows = planted(list(rollouts(generate(40, 1), 0, each=2)), **recorded({"token_ids": [VOCABULARY]}, {"response": "5"}))
    assert found(look(rows, *ROLLOUTS))["refused"] == [ROW]


def test_a_row_of_which_the_objective_trains_nothing(look):
    rows = planted(list(rollouts(generate(40, 1), 0, each=2)), **recorded({"response": "5 " * 300}))
    rules = found(look(rows, *ROLLOUTS))
    assert rules["nothing-trained"] == rules["dropped"] == [ROW]  # grpo does not train the demonstration in its place
    assert "nothing-trained" not in found(look(rows, "data.kind=rollouts", "objective.name=srft"))  # and srft does


def row_of(template, mask=None, **changes):
    """A row as a faulty loader would make it."""
    ids, prompt = template.encode("What is 2 + 3?", "It is 5.")
    mask = np.arange(len(ids)) >= prompt if mask is None else mask(ids, prompt)
    sample = AuditedSample(
        name="demonstration", token_ids=ids, roles=np.zeros(len(ids), np.int8), prompt_length=prompt, loss_mask=mask,
        kept=len(ids), text="It is 5.",
    )  # fmt: skip
    return AuditedRow(number=1, prompt="What is 2 + 3?", samples=(dataclasses.replace(sample, **changes),))


def rules_of(row, template):
    return {rule.name: list(what) for rule, find in ROW_RULES.items() if (what := list(find(row, Context.of(template))))}


def test_a_loader_that_errs_would_be_seen(template):
    assert rules_of(row_of(template), template) == {}
    everything = row_of(template, lambda ids, prompt: np.ones(len(ids), bool))
    prompt = everything.samples[0].prompt_length
    assert rules_of(everything, template) == {"trained-prompt": [f"demonstration: {prompt} prompt tokens have a loss"]}
    nothing = row_of(template, lambda ids, prompt: np.zeros(len(ids), bool))
    assert rules_of(nothing, template) == {"nothing-trained": ["no token has a loss"]}
    whole = row_of(template).samples[0]
    short = row_of(
        template, token_ids=whole.token_ids[:-1], loss_mask=whole.loss_mask[:-1], roles=whole.roles[:-1], kept=whole.kept - 1
    )
    assert rules_of(short, template) == {"missing-terminator": ["demonstration ends with '.'"]}


def test_two_tokens_that_begin_a_text(tiny_models, config_of, clean):
    template = ChatTemplate.load(tiny_models("qwen3"))
    template.tokenizer.bos_token = "<|endoftext|>"
    template.tokenizer.chat_template = "<|endoftext|>" + template.tokenizer.chat_template
    config = config_of(planted(clean, prompt=lambda text: f"<|endoftext|>{text}"))
    rows = audit_rows(read_records(config.data), config, build_objective({"name": "sft"}), template, VOCABULARY)
    (rule,) = [find for rule, find in ROW_RULES.items() if rule.name == "bos-twice"]
    assert {row.number: list(rule(row, Context.of(template))) for row in rows if list(rule(row, Context.of(template)))} == {
        ROW: ["demonstration has 2 of <|endoftext|>"]
    }


def test_thoughts_that_the_template_opens(tiny_models, config_of, clean):
    template = ChatTemplate.load(tiny_models("qwen3"))
    template.tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    rows = [row | {"demonstration": f"Hm.</think> {row['demonstration']}"} for row in clean]
    config = config_of(planted(rows, demonstration="It is 5."))
    found = []
    for row in audit_rows(read_records(config.data), config, build_objective({"name": "sft"}), template, VOCABULARY):
        for rule, find in ROW_RULES.items():
            found += [(rule.name, row.number, what) for what in find(row, Context.of(template))]
    assert found == [("think-unbalanced", ROW, "demonstration: <think> is not closed")]


def test_every_rule_is_named_once_and_says_what_to_do():
    names = [rule.name for rule in ROW_RULES]
    assert len(set(names)) == len(names)
    assert all(rule.meaning.endswith(".") and rule.remedy.endswith(".") for rule in ROW_RULES)
