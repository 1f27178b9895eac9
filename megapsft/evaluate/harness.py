"""lm-evaluation-harness over our engines: its tasks ask for texts and for log-probabilities, and it scores them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from megapsft.data.chat_template import ChatTemplate
from megapsft.data.pack import pack
from megapsft.data.plan import Layout
from megapsft.errors import Refused
from megapsft.evaluate.engine import Opened
from megapsft.policy.forward import Head, evaluate, read
from megapsft.policy.generate import InProcess
from megapsft.rollout.base import Request, Sampling
from megapsft.types import Sample

MAX_TOKENS = 256  # of a text where the task does not say, as in the harness
AT_ONCE = 64  # continuations in a pass


class Answers:
    """What a task asks for.

    Args:
        max_length: positions of the model; of a longer context the beginning is left out, as in the harness.
    """

    def __init__(self, opened: Opened, template: ChatTemplate, max_length: int, seed: int = 0):
        self.opened, self.template, self.max_length, self.seed = opened, template, max_length, seed

    def texts(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """To each (context, options) a text up to the first of `until`: `max_gen_toks`, and where `do_sample`, `temperature`,
        `top_p` and `top_k`; greedy where not.

        Raises:
            Refused: an option that is none of these.
        """
        found = [""] * len(asked)
        by_sampling: dict[tuple[Sampling, tuple[str, ...]], list[int]] = {}
        for index, (_, options) in enumerate(asked):
            by_sampling.setdefault(self._sampling(options), []).append(index)
        for (sampling, until), indices in by_sampling.items():
            room = self.max_length - sampling.max_tokens
            requests = [Request(prompt_ids=tuple(self._ids(asked[index][0])[-room:])) for index in indices]
            seen: dict[tuple[int, ...], int] = {}
            numbered = []
            for request in requests:
                seen[request.prompt_ids] = number = seen.get(request.prompt_ids, -1) + 1
                numbered.append(Request(prompt_ids=request.prompt_ids, number=number))
            for index, rollout in zip(indices, self.opened.engine.generate(numbered, sampling), strict=True):
                ids = rollout.response_ids
                ended = ids and ids[-1] in self.template.stop_token_ids
                found[index] = _before(self.template.tokenizer.decode(ids[:-1] if ended else ids), until)
        return found

    def loglikelihoods(self, asked: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each continuation of a context the sum of its log-probabilities, nats, and whether greedy decoding gives it.

        Raises:
            Refused: the engine is not in this process; a continuation without tokens.
        """
        engine = self.opened.engine
        if not isinstance(engine, InProcess):
            rule = "asks for log-probabilities of given texts, which only the policy itself has"
            raise Refused("--engine sglang: the task", rule, "use --engine inprocess")
        pairs = [self._pair(context, continuation) for context, continuation in asked]
        found: list[tuple[float, bool]] = []
        for start in range(0, len(pairs), AT_ONCE):
            some = pairs[start : start + AT_ONCE]
            sums = self._sums(engine, some)
            found += [(total, self._greedy(engine, *pair)) for total, pair in zip(sums, some, strict=True)]
        return found

    def _sums(self, engine: InProcess, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        samples = []
        for context, continuation in pairs:
            ids = np.array(context + continuation, dtype=np.int32)
            samples.append(Sample(token_ids=ids, loss_mask=np.arange(len(ids)) >= len(context), source="lm-eval"))
        layout = Layout(packing=True, pack_length=max(map(len, samples)), micro_batch_size=1)
        batch = pack(
            [(sample,) for sample in samples], minibatch_size=len(samples), layout=layout, aggregation="token-mean",
            max_response_length=None, pad_token_id=self.template.pad_token_id,
        )  # fmt: skip
        (minibatch,) = batch.minibatches
        sums = np.zeros(len(samples))
        for microbatch, output in zip(minibatch.microbatches, evaluate(engine.policy, minibatch, Head()), strict=True):
            mask = microbatch.loss_mask.cpu().numpy()
            logprobs = read(output).logprobs.cpu().double().numpy()
            np.add.at(sums, microbatch.sample_ids.cpu().numpy()[mask], logprobs[mask])
        return sums.tolist()

    def _greedy(self, engine: InProcess, context: list[int], continuation: list[int]) -> bool:
        sampling = Sampling(temperature=0.0, max_tokens=len(continuation))
        (rollout,) = engine.generate([Request(prompt_ids=tuple(context))], sampling)
        return list(rollout.response_ids) == continuation

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Their ids, cut where the context ends in the ids of both together; an empty context is the end of a turn."""
        if not context:
            before, after = [self.template.terminator_id], self._ids(continuation)
        else:
            blank = len(context) - len(context.rstrip())
            context, continuation = context[: len(context) - blank], context[len(context) - blank :] + continuation
            before, both = self._ids(context), self._ids(context + continuation)
            after = both[len(before) :]
            before = both[: len(before)]
        if not after:
            raise Refused(f"continuation {continuation!r}", "has no tokens of its own", "mend the task")
        return before[-(self.max_length - len(after)) :], after

    def _sampling(self, options: Mapping[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        options = dict(options)
        until = options.pop("until", ())
        until = (until,) if isinstance(until, str) else tuple(until or ())
        do_sample, max_tokens = options.pop("do_sample", False), int(options.pop("max_gen_toks", MAX_TOKENS))
        drawn = {key: options.pop(key) for key in ("temperature", "top_p", "top_k") if key in options}
        if options:
            known = "until, max_gen_toks, do_sample, temperature, top_p, top_k"
            raise Refused(f"generation_kwargs: {', '.join(options)}", "is not an option of our engines", f"use {known}")
        drawn = drawn if do_sample else {"temperature": 0.0}
        limits = {"max_tokens": max_tokens, "stop_token_ids": self.template.stop_token_ids, "seed": self.seed}
        return Sampling(**drawn, **limits), until

    def _ids(self, text: str) -> list[int]:
        return self.template.tokenizer(text, add_special_tokens=False)["input_ids"]


def _before(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.partition(end)[0] if end else text
    return text


def need_lm_eval() -> None:
    """Refuse where the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise Refused("--lm-eval", "needs lm-evaluation-harness, which is not installed", "pip install 'megapsft[harness]'")


def run_task(path: Path, answers: Answers, *, limit: int | None = None, chat: bool = True) -> dict[str, Any]:
    """The results of one task, by metric, as the harness computes them. Nothing is downloaded but what the task names.

    Args:
        path: the task's YAML; its data may be a local file (`dataset_path: json`, `dataset_kwargs: {data_files: ...}`).
        chat: put contexts into the model's chat template as a user turn.

    Raises:
        Refused: no harness, no such file, or no name of a task in it.
    """
    need_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Ours(LM):
        def generate_until(self, requests: list) -> list[str]:
            return answers.texts([request.args for request in requests])

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            return answers.loglikelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            return [total for total, _ in answers.loglikelihoods([("", *request.args) for request in requests])]

        @property
        def tokenizer_name(self) -> str:
            return answers.template.tokenizer.name_or_path.replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str:
            return answers.template.tokenizer.chat_template

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            render = answers.template.tokenizer.apply_chat_template
            return render(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)

    if not path.is_file():
        raise Refused(f"--lm-eval {path}", "is not a file", "name the YAML of a task")
    name = re.search(r"^task:\s*['\"]?([^\s'\"]+)", path.read_text(), re.MULTILINE)
    if name is None:
        raise Refused(f"--lm-eval {path}", "names no task", "give it a line `task: NAME`")
    tasks = TaskManager(include_path=str(path.parent), include_defaults=False)
    found = simple_evaluate(model=Ours(), tasks=[name[1]], task_manager=tasks, limit=limit, apply_chat_template=chat)
    return dict(found["results"][name[1]])
