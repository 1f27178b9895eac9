"""The counts of an audit, which rows it shows, and the spans of their tokens."""

import json

from megapsft.audit.audit import Warned, choose_rows
from megapsft.data.arithmetic import generate, rollouts


def test_counts_are_those_of_the_rows(clean, look):
    clean[2]["demonstration"] = "Long. " * 200
    audit = look(clean, "data.max_length=300")
    assert (audit.rows, audit.rows_trained, audit.samples, audit.samples_trained, audit.truncated) == (40, 39, 40, 39, 0)
    assert audit.one_terminator == audit.responses == 39
    roles = {role.role: role for role in audit.roles}
    assert set(roles) == {"template", "user", "response", "terminator"}
    assert audit.tokens == sum(role.tokens for role in audit.roles)
    assert audit.tokens_trained == roles["response"].tokens + roles["terminator"].tokens
    assert roles["terminator"].tokens == roles["terminator"].trained == 39
    assert roles["user"].trained == roles["template"].trained == 0
    assert [(drop.reason, drop.samples, drop.rows) for drop in audit.drops] == [("too long", 1, (3,))]
    prompts, responses, together = audit.histograms
    assert sum(prompts.counts) == sum(responses.counts) == sum(together.counts) == 40  # those that are dropped too
    assert together.limits == {"data.max_length": 300}
    assert audit.packing.tokens == audit.tokens


def test_spans_say_what_becomes_of_each_token(clean, look):
    clean[0]["demonstration"] = "Word " * 100
    audit = look(clean, "data.max_length=200", "data.overlong=truncate", shown=2)
    first, last = audit.shown
    assert (first.number, last.number) == (1, 21)
    (sample,) = last.samples
    assert (sample.fate, sample.terminators, sample.reward) == ("trained", 1, None)
    assert [(span.kind, span.special, span.text) for span in sample.spans] == [
        ("prompt", True, "<|im_start|>"),
        ("prompt", False, f"user\n{clean[20]['prompt']}"),
        ("prompt", True, "<|im_end|>"),
        ("prompt", False, "\n"),
        ("prompt", True, "<|im_start|>"),
        ("prompt", False, "assistant\n"),
        ("trained", False, clean[20]["demonstration"]),
        ("trained", True, "<|im_end|>"),
    ]
    (sample,) = first.samples
    assert sample.fate == "truncated"
    assert [span.kind for span in sample.spans][-3:] == ["trained", "truncated", "truncated"]
    assert sum(span.tokens for span in sample.spans if span.kind == "truncated") == sample.tokens - 200
    assert first.warnings[0][0] == "truncated"


def test_rollouts_and_what_is_left_out_of_them(look):
    audit = look(list(rollouts(generate(40, 1), 0, each=2)), "data.kind=rollouts", "objective.name=grpo", shown=1)
    samples = audit.shown[0].samples
    assert [(sample.name, sample.fate) for sample in samples] == [
        ("rollout 1", "trained"), ("rollout 2", "trained"), ("demonstration", "left out")
    ]  # fmt: skip
    assert all(sample.reward in (0.0, 1.0) for sample in samples[:2])
    assert {span.kind for span in samples[2].spans} == {"dropped"}
    assert [(drop.reason, drop.samples) for drop in audit.drops] == [("left out", 40)]
    assert (audit.rows_trained, audit.samples, audit.samples_trained) == (40, 120, 80)


def test_prompts_are_shown_as_what_will_be_answered(look):
    rows = [{"prompt": row["question"], "reference": row["answer"]} for row in generate(40, 1)]
    overrides = ["data.kind=prompts", "objective.name=grpo", "rewards=[{name: math_answer}]", "rollout.max_tokens=64"]
    audit = look(rows, *overrides, shown=1)
    assert audit.packing is None
    (sample,) = audit.shown[0].samples
    assert (sample.name, sample.fate, sample.trained) == ("prompt", "to be sampled", 0)
    assert [histogram.name for histogram in audit.histograms] == ["prompt"]
    assert audit.histograms[0].limits == {"data.max_length - rollout.max_tokens": 2048 - 64}


def test_rows_with_warnings_are_shown_and_others_evenly():
    warned = [Warned(rule=None, found=tuple((row, "") for row in rows)) for rows in ([7, 8, 9], [50])]
    assert choose_rows(100, 5, []) == [11, 31, 51, 71, 91]
    assert choose_rows(3, 20, []) == [1, 2, 3]
    assert choose_rows(3, 0, warned) == []
    assert choose_rows(100, 4, warned) == [7, 26, 50, 76]  # one of each rule
    assert choose_rows(100, 5, warned)[:2] == [7, 8]  # then the next


def test_what_is_written_as_json(clean, look):
    clean[9] = clean[3]
    audit = look(clean, shown=4)
    whole = json.loads(json.dumps(audit.to_dict()))
    assert set(whole) == {
        "path", "kind", "objective", "model", "rows", "rows_trained", "samples", "samples_trained", "truncated", "tokens",
        "tokens_trained", "one_terminator", "responses", "roles", "histograms", "packing", "drops", "warnings", "shown", "notes",
    }  # fmt: skip
    (warned,) = whole["warnings"]
    assert set(warned) == {"rule", "meaning", "remedy", "rows", "found"}
    assert (warned["rule"], warned["rows"], warned["found"]) == ("duplicate", [10], [{"row": 10, "what": "as row 4"}])
    assert whole["packing"]["filled"] == audit.packing.filled
    (row,) = [row for row in whole["shown"] if row["number"] == 10]
    assert row["warnings"] == [{"rule": "duplicate", "what": "as row 4"}]
    assert set(row["samples"][0]) == {"name", "fate", "tokens", "trained", "terminators", "reward", "spans"}
    assert set(row["samples"][0]["spans"][0]) == {"kind", "special", "tokens", "text"}


def test_what_was_sampled_is_said(clean, look):
    notes = " ".join(look(clean, "data.limit=30", shown=3).notes)
    assert "all 30 rows; 3 of them are shown" in notes
    assert "data.limit=30" in notes
    assert "Overlap was not looked for" in notes
