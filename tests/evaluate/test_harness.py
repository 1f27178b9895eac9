"""What lm-evaluation-harness is answered, against transformers. Not here: the harness itself, which is no dependency."""

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


def test_what_an_engine_cannot_say_is_refused(tiny_models):
    answers = Answers(Opened(Fixed(), True, None), ChatTemplate.load(tiny_models("qwen3")), 4096)
    with pytest.raises(Refused, match="asks for log-probabilities"):
        answers.loglikelihoods([("a", "b")])
    with pytest.raises(Refused, match="num_beams: is not an option of our engines"):
        answers.texts([("a", {"num_beams": 4})])


def test_options_of_benchmarks_are_refused_beside_a_task(tiny_models, tmp_path, capsys):
    assert main(["evaluate", "--model", str(tiny_models("qwen3")), "--lm-eval", str(tmp_path / "task.yaml"), "--n", "4"]) == 2
    assert "--n: is not read beside --lm-eval" in capsys.readouterr().err
