"""Groups that are sampled while training: prompts answered by an engine of the policy's weights, and rewarded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megapsft.checkpoint.together import from_first, refuse_together
from megapsft.config import Config
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.prompts import Prompts
from megapsft.data.rollouts import choose, to_sample
from megapsft.data.sampler import Sampler
from megapsft.errors import TrainingStopped
from megapsft.objectives.registry import build_objective
from megapsft.platform.clock import part
from megapsft.rewards.registry import build_rewards
from megapsft.rewards.sum import Scored, Sum, summary
from megapsft.rollout.base import Rollout, Sampling
from megapsft.rollout.collect import Answered, Collected, Stream, collect, resumed
from megapsft.rollout.dynamic_sampling import informative
from megapsft.train.demonstration_buffer import DemonstrationBuffer
from megapsft.train.engines import RETURN_ROUTING, Live
from megapsft.train.rollout_record import group_record, response_of, write_records
from megapsft.types import Group


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step trains, the same on every rank."""

    collected: Collected
    scored: tuple[tuple[Scored, ...], ...]  # of each group that of each rollout
    seconds: float  # that sampling and scoring took
    score_seconds: float  # of these, what scoring took


class Sampled:
    """Implements Source: `train.batch_size` groups a step, each `rollout.n` responses to a prompt, and its demonstration.

    Prompts come in the order of the sampler. The engine gets the weights of the policy before each step; version v is the policy
    after v steps. With `rollout.max_weight_lag` above 0 steps ahead are sampled in a thread while the policy is trained: those of
    step s are asked for when step s - lag begins, and nothing older is trained.

    Ranks: an engine outside of the process is spoken to by rank 0 alone, one in the process by all; rank 0 scores; all train.
    """

    def __init__(self, config: Config, prompts: Prompts, template: ChatTemplate, engine: Live, state: Mapping[str, Any]):
        self.config, self.prompts, self.template, self.engine = config, prompts, template, engine
        self.sampler = Sampler(len(prompts.prompts), config.train.batch_size, config.train.seed, config.data.shuffle)
        self.rewards: Sum | None = None  # of the first rank
        refuse_together(self._open_rewards)
        self.sampling = Sampling(
            temperature=config.train.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            max_tokens=config.rollout.max_tokens,
            stop_token_ids=template.stop_token_ids,
            seed=config.train.seed,
        )
        stream = Stream(drawn=state.get("drawn", 0), waiting=tuple(state.get("waiting", ())))
        self.stream = stream  # behind what has been trained
        self.ahead = resumed(stream, config.rollout.n)  # behind what has been sampled
        objective = build_objective(config.objective)
        self.buffer = DemonstrationBuffer(config.rollout.demonstration_buffer, objective, list(state.get("held", ())))
        self.metrics: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._futures: dict[int, Future[Step]] = {}

    def _open_rewards(self) -> None:
        self.rewards = build_rewards(self.config.rewards, self.config.rollout.reward_workers)

    def next_groups(self, step: int) -> list[Group]:
        """The groups of `step`. Collective."""
        with part("weight_update"):
            self.engine.update(step)
        with part("rollout_wait"):
            found = self._sample(step) if self.engine.everywhere else from_first(lambda: self._sampled_ahead(step))
        self.stream = found.collected.stream
        groups = [self._group(*one) for one in zip(found.collected.answered, found.scored, strict=True)]
        if self.config.data.select is not None:
            groups = [(sample,) for group in groups for sample in choose(group, self.config.data)]
        draws = [one.draw for one in found.collected.answered]
        groups = self.buffer.exchange(groups, draws, lambda draw: self._row(draw).demonstration)
        if self.rewards is not None and self.config.log.rollouts and (step + 1) % self.config.log.rollouts == 0:
            self._write(found, step + 1)
        self.metrics = self._metrics(found, step) | {
            "perf/rollout_seconds": found.seconds,
            "perf/score_seconds": found.score_seconds,
        }
        return groups

    def epoch(self, step: int) -> float:
        return self.stream.drawn / self.sampler.size

    def state(self) -> dict[str, Any]:
        return {"drawn": self.stream.drawn, "waiting": list(self.stream.waiting), "held": list(self.buffer.held)}

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.engine.close()  # what is asked ahead of the last step has no answer then
        self._thread.shutdown()
        if self.rewards is not None:
            self.rewards.close()

    def _sampled_ahead(self, step: int) -> Step:
        """Of rank 0: that of `step`, while those of the next steps are on their way."""
        last = min(step + self.config.rollout.max_weight_lag, self.config.train.steps - 1)
        for ahead in range(step, last + 1):
            if ahead not in self._futures:
                self._futures[ahead] = self._thread.submit(self._sample, ahead)
        try:
            found = self._futures.pop(step).result()
        except RuntimeError as error:  # nobody is left to ask
            raise TrainingStopped(f"step {step + 1} could not be sampled: {error}") from error
        versions = [rollout.weight_version for one in found.collected.answered for rollout in one.rollouts]
        lag = step - min(versions, default=step)
        if lag > self.config.rollout.max_weight_lag:
            raise TrainingStopped(f"a rollout of step {step + 1} is {lag} steps old, above rollout.max_weight_lag")
        return found

    def _sample(self, step: int) -> Step:
        """Ask and score until the step has its groups."""
        began, options, scores, scoring = time.perf_counter(), self.config.rollout, {}, []

        def teaches(whole: Sequence[Answered]) -> list[bool]:
            answered = time.perf_counter()
            scores.update(zip([one.draw for one in whole], self._score(whole), strict=True))
            scoring.append(time.perf_counter() - answered)
            if options.dynamic_sampling is None:
                return [True] * len(whole)
            outcomes = [[scored.parts[options.dynamic_sampling].value for scored in scores[one.draw]] for one in whole]
            kept = set(informative(outcomes))
            return [index in kept for index in range(len(whole))]

        self.ahead = collect(
            self.engine.engine,
            lambda draw: self._row(draw).token_ids,
            self.ahead,
            groups=self.config.train.batch_size,
            n=options.n,
            sampling=self.sampling,
            oldest=step - options.max_weight_lag,
            oversample=options.oversample,
            informative=teaches,
            rounds=options.max_rounds if options.dynamic_sampling is not None else 1,
        )
        scored = tuple(scores[one.draw] for one in self.ahead.answered)
        return Step(self.ahead, scored, time.perf_counter() - began, sum(scoring))

    def _row(self, draw: int) -> Any:
        return self.prompts.prompts[self.sampler.draw(draw, 1)[0]]

    def _score(self, answered: Sequence[Answered]) -> list[tuple[Scored, ...]]:
        """Of each group those of its rollouts. Collective where the engine is everywhere."""
        if self.engine.everywhere:
            return from_first(lambda: self._score_here(answered))
        return self._score_here(answered)

    def _score_here(self, answered: Sequence[Answered]) -> list[tuple[Scored, ...]]:
        responses = [
            response_of(self._row(one.draw), rollout, number, self.template)
            for one in answered
            for number, rollout in enumerate(one.rollouts, start=1)
        ]
        scored = iter(self.rewards(responses))
        return [tuple(next(scored) for _ in one.rollouts) for one in answered]

    def _group(self, answered: Answered, scored: Sequence[Scored]) -> Group:
        row = self._row(answered.draw)
        samples = [
            to_sample(
                list(rollout.prompt_ids),
                list(rollout.response_ids),
                f"{row.source}: rollout {number}",
                False,
                worth.total,
                np.array(rollout.rollout_logprobs, dtype=np.float32),
                self._routed_experts(rollout),
            )
            for number, (rollout, worth) in enumerate(zip(answered.rollouts, scored, strict=True), start=1)
        ]
        shown = row.demonstration is not None and self.config.data.select is None  # which imitates the policy's own alone
        return (*samples, row.demonstration) if shown else tuple(samples)

    def _routed_experts(self, rollout: Rollout) -> np.ndarray | None:
        """What the training passes are to choose again: [prompt + response - 1, MoE layers, K]; None where they are not.

        Raises:
            TrainingStopped: a server returned none, or not one choice for each token and layer.
        """
        if self.config.model.moe_routing_replay != "rollout":
            return None
        found, hf = rollout.routed_experts, self.engine.policy.hf
        wanted = (len(rollout.prompt_ids) + len(rollout.response_ids) - 1, hf.num_hidden_layers, hf.num_experts_per_tok)
        if found is None or found.shape != wanted:
            shape = "none" if found is None else list(found.shape)
            raise TrainingStopped(
                f"model.moe_routing_replay=rollout, and a server returned {shape} of the experts of {list(wanted)} (tokens, "
                f"layers, experts of a token). Start it with {RETURN_ROUTING}."
            )
        return found

    def _write(self, found: Step, number: int) -> None:
        """The rollouts of a step, for people and for `data.kind=rollouts`."""
        records = (
            group_record(self._row(one.draw), one.rollouts, scored, self.template, draw=one.draw)
            for one, scored in zip(found.collected.answered, found.scored, strict=True)
        )
        write_records(Path(self.config.run.dir) / "rollouts" / f"step-{number:06d}.jsonl", records)

    def _metrics(self, found: Step, step: int) -> dict[str, float]:
        collected = found.collected
        rollouts = [rollout for one in collected.answered for rollout in one.rollouts]
        if not rollouts:
            return {"rollout/groups": 0.0, "rollout/discarded_groups": float(collected.discarded)}
        lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
        rewards = [[scored.total for scored in group] for group in found.scored]
        lags = [step - rollout.weight_version for rollout in rollouts]
        return summary([scored for group in found.scored for scored in group]) | {
            "rollout/groups": float(len(collected.answered)),
            "rollout/equal_groups": sum(len(set(group)) == 1 for group in rewards) / len(rewards),
            "rollout/discarded_groups": float(collected.discarded),
            "rollout/held_demonstrations": float(len(self.buffer.held)),
            "rollout/length": float(lengths.mean()),
            "rollout/length_max": float(lengths.max()),
            "rollout/unfinished": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
            "rollout/nll": -float(np.mean(np.concatenate([rollout.rollout_logprobs for rollout in rollouts]))),
            "rollout/weight_lag": float(np.mean(lags)),
            "rollout/weight_lag_max": float(max(lags)),
            "rollout/aborted": float(collected.aborted),
            "rollout/restarted": float(collected.restarted),
            "rollout/tokens_per_second": float(lengths.sum()) / found.seconds,
        }
