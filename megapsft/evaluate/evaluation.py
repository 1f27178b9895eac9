"""Several benchmarks answered and scored: responses that are kept as they come, a table, and all of it as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from megapsft.checkpoint.hf import read_config
from megapsft.config import RolloutConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.evaluate.batch_inference import check_n, identity
from megapsft.evaluate.benchmark import Benchmark
from megapsft.evaluate.engine import Dtype, check_room, open_engine
from megapsft.evaluate.journal import Journal
from megapsft.evaluate.protocol import protocol_of
from megapsft.evaluate.sample import Unit, fill, open_progress, rollout_of, units
from megapsft.evaluate.score import Result, score, summarise
from megapsft.output.whole import write_whole
from megapsft.rewards.registry import build_reward, build_rewards
from megapsft.rollout.base import Rollout, Sampling
from megapsft.train.rollout_record import rollout_record

RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark, and how often and how it is answered."""

    benchmark: Benchmark
    n: int  # responses to each problem
    sampling: Sampling


def plan_task(
    model: Path,
    benchmark: Benchmark,
    template: ChatTemplate,
    *,
    n: int | None = None,
    top_k: int = -1,
    seed: int = 0,
    max_tokens: int | None = None,
    **given: float,
) -> Task:
    """The protocol of the benchmark, but for what is given.

    Args:
        max_tokens: default: that of the protocol, or what the model's context leaves behind the longest prompt if that is less.
        given: temperature, top_p.
    """
    protocol = protocol_of(benchmark.name)
    if max_tokens is None:
        max_tokens = min(protocol.max_tokens, read_config(model).max_position_embeddings - benchmark.longest_prompt)
    options = {"temperature": protocol.temperature, "top_p": protocol.top_p} | given
    sampling = Sampling(**options, top_k=top_k, seed=seed, max_tokens=max(1, max_tokens), stop_token_ids=template.stop_token_ids)
    return Task(benchmark=benchmark, n=protocol.n if n is None else n, sampling=sampling)


@dataclass(frozen=True)
class Evaluated:
    task: Task
    result: Result
    metrics: Mapping[str, float]
    resumed: int  # responses that were there already


def evaluate(
    model: Path,
    tasks: Sequence[Task],
    template: ChatTemplate,
    out: Path,
    *,
    options: RolloutConfig,
    dtype: Dtype,
    rewards: Sequence[Mapping[str, Any]],
    ks: Sequence[int] | None = None,
    progress: bool = True,
) -> list[Evaluated]:
    """Answer what is not answered yet, into OUT/<benchmark>.jsonl, one response a line; score all; write OUT/results.json.

    No engine is opened where nothing is missing.

    Args:
        options: which engine, and how it runs.
        rewards: entries as in the config; a response is right where their sum is 1.
        ks: of pass@k; default: those of KS that n allows.

    Raises:
        Refused: what `Journal`, `open_engine` and the rewards refuse; two benchmarks of one name; prompts without room; a k that
            no benchmark has responses for.
    """
    check_tasks(model, tasks, rewards, ks)
    with ExitStack() as stack:
        journals = [_open(stack, model, task, out, options.engine, dtype) for task in tasks]
        wanted = [units(task.benchmark.problems, task.n, 1) for task in tasks]
        resumed = [len(journal.done) for journal in journals]
        if any(len(journal.done) < len(some) for journal, some in zip(journals, wanted, strict=True)):
            with open_engine(model, options, dtype, out / "servers") as opened:
                for task, journal, some in zip(tasks, journals, wanted, strict=True):
                    problems = task.benchmark.problems

                    def to_record(unit: Unit, rollouts: Sequence[Rollout], problems=problems) -> dict[str, Any]:
                        problem = problems[unit.row]
                        ours = {"row": unit.row, "number": unit.number, "prompt_token_ids": list(problem.token_ids)}
                        return ours | {"rollouts": [rollout_record(problem, rollouts[0], template, logprobs=False)]}

                    with open_progress(progress, task.benchmark.name, len(some), len(journal.done)) as advance:
                        fill(journal, problems, some, opened, task.sampling, to_record, advance)
        evaluated = []
        with build_rewards(rewards) as scoring:
            for task, journal, before in zip(tasks, journals, resumed, strict=True):
                benchmark = task.benchmark
                result = score(benchmark.name, benchmark.problems, _answers(task, journal), template, scoring)
                evaluated.append(Evaluated(task, result, summarise(result, ks), before))
        _write(out / RESULTS, model, evaluated, rewards)
    return evaluated


def check_tasks(
    model: Path, tasks: Sequence[Task], rewards: Sequence[Mapping[str, Any]], ks: Sequence[int] | None
) -> None:
    """Refuse what `evaluate` refuses before it opens anything."""
    if not tasks:
        raise Refused("--data", "names no file", "name one at least")
    names = [task.benchmark.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise Refused(f"--data: {name}", "is the name of two files", "rename one of them")
        if f"{name}.json" == RESULTS:
            raise Refused(f"--data: {name}", f"is the name of {RESULTS} too", "rename the file")
    for task in tasks:
        check_room(model, task.benchmark.longest_prompt, task.sampling.max_tokens)
        check_n(task.n, task.sampling)
    most = max(task.n for task in tasks)
    for k in ks or ():
        if not 1 <= k <= most:
            raise Refused(f"k={k}", f"must lie in 1..{most}, the responses to a problem", f"use --n {k}, or ask for less")
    for entry in rewards:
        build_reward(entry)


def _open(stack: ExitStack, model: Path, task: Task, out: Path, engine: str, dtype: Dtype) -> Journal:
    decides = identity(model, task.benchmark, task.n, task.sampling, engine, dtype, ())
    return stack.enter_context(Journal(out / f"{task.benchmark.name}.jsonl", decides))


def _answers(task: Task, journal: Journal) -> list[list[Rollout]]:
    """Of each problem its responses, by their number."""
    found: list[dict[int, Rollout]] = [{} for _ in task.benchmark.problems]
    for record in journal.read():
        (rollout,) = record["rollouts"]
        found[record["row"]][record["number"]] = rollout_of(rollout, record["prompt_token_ids"])
    return [[some[number] for number in sorted(some)] for some in found]


def _write(path: Path, model: Path, evaluated: Sequence[Evaluated], rewards: Sequence[Mapping[str, Any]]) -> None:
    """Everything as JSON; what is not known is null. The old file or the new one, never half of one."""
    metrics = {key: value if math.isfinite(value) else None for one in evaluated for key, value in one.metrics.items()}
    benchmarks = {}
    for one in evaluated:
        sampling = {key: value for key, value in asdict(one.task.sampling).items()}
        benchmarks[one.result.benchmark] = {"n": one.task.n, "sampling": sampling, **asdict(one.result)}
    content = {"model": str(model), "rewards": [dict(entry) for entry in rewards], "metrics": metrics, "benchmarks": benchmarks}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def table(evaluated: Sequence[Evaluated]) -> Table:
    """One row a benchmark: avg@n and pass@k in percent with their standard errors, tokens of a response, and what went wrong."""
    shown = [{key.rpartition("/")[2]: value for key, value in one.metrics.items()} for one in evaluated]
    ks = sorted({int(key[5:]) for keys in shown for key in keys if key.startswith("pass@") and not key.endswith("_se")})
    found = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    found.add_column("benchmark", no_wrap=True)
    for heading in ("problems", "n", "avg@n", *(f"pass@{k}" for k in ks), "length", "unfinished", "failures"):
        found.add_column(heading, justify="right", no_wrap=True)
    for one, values in zip(evaluated, shown, strict=True):
        found.add_row(
            one.result.benchmark,
            str(len(one.result.scores)),
            str(one.task.n),
            _percent(values, "avg"),
            *(_percent(values, f"pass@{k}") for k in ks),
            f"{values['length']:.1f} of {one.task.sampling.max_tokens}",
            f"{values['unfinished']:.1%}",
            f"{values['failures']:.0f}",
        )
    return found


def show(evaluated: Sequence[Evaluated]) -> None:
    """Print the table, as wide as it is: numbers are never cut."""
    console, whole = Console(), table(evaluated)
    width = Measurement.get(console, console.options.update(max_width=1000), whole).maximum
    Console(width=max(console.width, width)).print(whole)


def _percent(values: Mapping[str, float], key: str) -> str:
    if key not in values:
        return "–"
    error = values[f"{key}_se"]
    return f"{100 * values[key]:.2f}" + (f" ± {100 * error:.2f}" if math.isfinite(error) else "")
