"""What lm-evaluation-harness is answered, and what it makes of it, offline, against transformers."""

import json
import math

import pytest
import torch
import transformers

from megapsft.cli import main
from megapsft.config import RolloutConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.evaluate.engine import Opened, open_engine
from megapsft.evaluate.harness import Answers
from megapsft.rollout.base import Rollout
from tests.command import megapsft
from tests.ranks import run_ranks

CONTEXT = "Ann has 3 pencils and buys 4 more."


def ids(template, text):
    return template.tokenizer(text, add_special_tokens=False)["input_ids"]


def greedy(model, context, count):
    """The `count` most probable tokens, one after another."""
    tokens = list(context)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(context) :]


def likelihoods(model_dir, asked, folder):
    with open_engine(model_dir, RolloutConfig(), "float32", folder) as opened:
        return Answers(opened, ChatTemplate.load(model_dir), 4096).loglikelihoods(asked)


def texts(model_dir, asked, folder):
    with open_engine(model_dir, RolloutConfig(), "float32", folder) as opened:
        return Answers(opened, ChatTemplate.load(model_dir), 4096).texts(asked)


def test_log_probabilities_are_those_of_transformers(tiny_models, tmp_path):
    folder = tiny_models("qwen3")
    template = ChatTemplate.load(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = [(CONTEXT, " She has 7."), (CONTEXT + " ", "She has 8 pencils."), ("", "Seven")]
    (found,) = run_ranks(1, likelihoods, folder, asked, tmp_path)
    for (context, continuation), (total, _) in zip(asked, found, strict=True):
        before = ids(template, context.rstrip()) or [template.terminator_id]
        whole = before + ids(template, context + continuation)[len(before) if context else 0 :]
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        expected = math.fsum(float(logprobs[place - 1, whole[place]]) for place in range(len(before), len(whole)))
        assert total == pytest.approx(expected, abs=1e-3)


def test_a_continuation_is_greedy_where_decoding_gives_it(tiny_models, tmp_path):
    folder = tiny_models("qwen3")
    template = ChatTemplate.load(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (best,) = greedy(model, ids(template, CONTEXT), 1)
    words = template.tokenizer.decode([best])
    assert ids(template, CONTEXT + words) == [*ids(template, CONTEXT), best], "the words are read as other tokens"
    (found,) = run_ranks(1, likelihoods, folder, [(CONTEXT, words), (CONTEXT, " She")], tmp_path)
    assert [flag for _, flag in found] == [True, False]


def test_texts_end_before_the_first_of_until(tiny_models, tmp_path):
    folder = tiny_models("qwen3")
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
    (whole,) = run_ranks(1, texts, folder, [(CONTEXT, options)] * 2, tmp_path)
    assert whole[0] != whole[1]  # one context twice is two samples
    end = whole[0][len(whole[0]) // 2]
    (cut,) = run_ranks(1, texts, folder, [(CONTEXT, options | {"until": [end]})], tmp_path)
    assert cut == [whole[0].partition(end)[0]]


class Fixed:
    """Not an engine of this process."""

    def generate(self, requests, sampling, enough=None):
        return [Rollout(prompt_ids=r.prompt_ids, response_ids=(9,), rollout_logprobs=(0.0,), finish_reason="length",
                        weight_version=0) for r in requests]  # fmt: skip


TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


def test_a_task_from_a_local_file(tiny_models, tmp_path):
    model_dir, numbers = tiny_models("qwen3"), list(range(12))
    rows = [
        {"question": f"What is {n} + 3?", "choices": [str(n + 3), str(n + 5), str(n)], "label": n % 3} for n in numbers
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = ["evaluate", "--model", str(model_dir), "--lm-eval", str(tmp_path / "task.yaml"), "--out", str(tmp_path / "out")]
    done = megapsft(*command, "--limit", "10", **offline)
    assert done.returncode == 0, done.stderr

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    template = ChatTemplate.load(model_dir)
    right = 0
    for row in rows[:10]:
        turn = [{"role": "user", "content": row["question"]}]
        context = template.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        scores = []
        for choice in row["choices"]:
            before, both = ids(template, context), ids(template, context + choice)
            with torch.no_grad():
                logprobs = model(torch.tensor([both])).logits[0].log_softmax(-1)
            scores.append(sum(logprobs[at - 1, both[at]].item() for at in range(len(before), len(both))))
        right += scores.index(max(scores)) == row["label"]
    found = json.loads((tmp_path / "out/lm-eval-task.json").read_text())
    assert found["acc,none"] == pytest.approx(right / 10)
    assert "acc,none" in done.stdout


def test_what_an_engine_cannot_say_is_refused(tiny_models):
    answers = Answers(Opened(Fixed(), True, None), ChatTemplate.load(tiny_models("qwen3")), 4096)
    with pytest.raises(Refused, match="asks for log-probabilities"):
        answers.loglikelihoods([("a", "b")])
    with pytest.raises(Refused, match="num_beams: is not an option of our engines"):
        answers.texts([("a", {"num_beams": 4})])


def test_options_of_benchmarks_are_refused_beside_a_task(tiny_models, tmp_path, capsys):
    assert main(["evaluate", "--model", str(tiny_models("qwen3")), "--lm-eval", str(tmp_path / "task.yaml"), "--n", "4"]) == 2
    assert "--n: is not read beside --lm-eval" in capsys.readouterr().err
