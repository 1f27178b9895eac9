"""Benchmarks answered by the policy while it is trained."""

from __future__ import annotations

from megapsft.checkpoint.together import from_first
from megapsft.errors import Refused
from megapsft.evaluate.benchmark import load_benchmark
from megapsft.evaluate.score import score, summarise
from megapsft.rewards.registry import build_reward, build_rewards
from megapsft.rollout.base import Request, Rollout, Sampling
from megapsft.train.engines import Live, open_engine
from megapsft.train.plan import RunPlan
from megapsft.train.run import Run
from megapsft.train.sampled import Sampled


class DuringTraining:
    """Implements Evaluation. Answers come from the engine that samples for training, or from one of its own.

    Raises:
        Refused: what `load_benchmark` refuses, or prompts that leave no room for a response.
    """

    def __init__(self, plan: RunPlan):
        options, self._plan = plan.config.evaluate, plan
        _, reward = build_reward({"name": options.reward})
        self._benchmarks = [
            load_benchmark(
                path,
                plan.template,
                limit=options.limit,
                system_prompt=plan.config.data.system_prompt,
                needs_reference=reward.needs_reference,
            )
            for path in options.data
        ]
        names = [benchmark.name for benchmark in self._benchmarks]
        for benchmark in self._benchmarks:
            if names.count(benchmark.name) > 1:
                raise Refused(f"evaluate.data: {benchmark.name}", "is the name of two files", "rename one of them")
            if benchmark.longest_prompt + options.max_tokens > plan.hf.max_position_embeddings:
                rule = f"and prompts of {benchmark.longest_prompt} tokens exceed max_position_embeddings"
                most = plan.hf.max_position_embeddings - benchmark.longest_prompt
                raise Refused(f"evaluate.max_tokens={options.max_tokens}", rule, f"use {most} or less")
        self._sampling = Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            stop_token_ids=plan.template.stop_token_ids,
            seed=plan.config.train.seed,
        )
        self._own: Live | None = None

    def __call__(self, run: Run) -> dict[str, float]:
        """`evaluate/<benchmark>/...` of `summarise`, on every rank. Collective."""
        live = run.source.engine if isinstance(run.source, Sampled) else self._engine(run)
        live.update(run.done.step)
        if live.everywhere:
            answers = self._answer(live)
            return from_first(lambda: self._score(answers))
        return from_first(lambda: self._score(self._answer(live)))

    def close(self) -> None:
        if self._own is not None:
            self._own.close()

    def _engine(self, run: Run) -> Live:
        if self._own is None:
            self._own = open_engine(self._plan, run.policy)
        return self._own

    def _answer(self, live: Live) -> list[list[list[Rollout]]]:
        """Of each benchmark and each problem its responses."""
        n = self._plan.config.evaluate.n
        requests = [
            Request(prompt_ids=problem.token_ids, number=row * n + number)
            for benchmark in self._benchmarks
            for row, problem in enumerate(benchmark.problems)
            for number in range(n)
        ]
        rollouts = iter(live.engine.generate(requests, self._sampling))
        return [[[next(rollouts) for _ in range(n)] for _ in benchmark.problems] for benchmark in self._benchmarks]

    def _score(self, answers: list[list[list[Rollout]]]) -> dict[str, float]:
        found: dict[str, float] = {}
        with build_rewards([{"name": self._plan.config.evaluate.reward}]) as rewards:
            for benchmark, rollouts in zip(self._benchmarks, answers, strict=True):
                found |= summarise(score(benchmark.name, benchmark.problems, rollouts, self._plan.template, rewards))
        return found


__all__ = ["DuringTraining"]
