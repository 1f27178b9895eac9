"""megapsft evaluate: benchmarks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import tyro

from megapsft.cli.engine import ENGINE, EngineOptions
from megapsft.cli.numbers import numbers_of
from megapsft.cli.printed import earlier
from megapsft.cli.prompts import PROMPTS, PromptOptions
from megapsft.errors import Refused


def evaluate(
    *,
    model: Path,
    data: tuple[Path, ...] = (),
    lm_eval: Path | None = None,
    out: Path | None = None,
    n: tuple[int, ...] = (),
    limit: tuple[int, ...] = (),
    k: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int = -1,
    max_tokens: int | None = None,
    reward: tuple[str, ...] = ("math_answer",),
    prompts: tyro.conf.OmitArgPrefixes[PromptOptions] = PROMPTS,
    engine: tyro.conf.OmitArgPrefixes[EngineOptions] = ENGINE,
) -> int:
    """Answer benchmarks, and print avg@n and pass@k with their standard errors.

    For example:
        megapsft evaluate --model models/tiny --data aime24.jsonl --n 32
        megapsft evaluate --model models/tiny --data gsm8k-test.jsonl math500.jsonl --limit 200 50 --k 1,4 --n 4
        megapsft evaluate --model Qwen3-8B --data aime24.jsonl --engine sglang --tensor-parallel-size 2 --out evaluations/8b

    Killed, it goes on from there when it is run again; no response is asked for twice.

    Args:
        model: Hugging Face folder with a tokenizer and a chat template.
        data: .jsonl or .parquet files of problems with their answers; the name of a file is that of its benchmark.
        lm_eval: instead of data: YAML of a task of lm-evaluation-harness, which asks and scores as it says; --limit holds too.
        out: folder for responses and results.json; default: evaluations/ and the name of the model's folder.
        n: responses to each problem, one number for all files or one for each; default: 32 for aime and amc, 1 for gsm8k, else 8.
        limit: only the first problems, one number for all files or one for each.
        k: of pass@k, with commas; default: 1,8,32 as far as n goes.
        temperature: 0 is greedy; default: 0.7.
        top_p: tokens are drawn from the most probable ones that have so much together; default: 0.95.
        top_k: tokens are drawn from so many; -1: from all.
        max_tokens: of a response; default: 10240 (4096 for ifeval), or what the model's context leaves if that is less.
        reward: names of rewards, or path/to/file.py; a response is right where their sum is 1.
    """
    from megapsft.data.chat_template import ChatTemplate
    from megapsft.evaluate.benchmark import load_benchmark
    from megapsft.evaluate.evaluation import RESULTS, plan_task, show
    from megapsft.evaluate.evaluation import evaluate as answer
    from megapsft.output.places import check_folder
    from megapsft.rewards.registry import build_reward

    options = engine.resolved()
    folder = Path("evaluations") / model.resolve().name if out is None else out
    check_folder(f"--out {folder}", folder)
    if lm_eval is not None:
        of_data = {"--data": data, "--n": n, "--k": k, "--temperature": temperature, "--top-p": top_p, "--max-tokens": max_tokens,
                   "--top-k": top_k != -1, "--reward": reward != ("math_answer",),
                   **{"--" + name.replace("_", "-"): value for name, value in asdict(prompts).items()}}  # fmt: skip
        for option, value in of_data.items():
            if value not in (None, (), False):
                raise Refused(option, "is not read beside --lm-eval: the task says it", "leave it out")
        return _lm_eval(lm_eval, model, folder, engine, _each("--limit", limit, (lm_eval,))[0])
    rewards = [{"name": name} for name in reward]
    needs_reference = any(build_reward(entry)[1].needs_reference for entry in rewards)
    ks = None if k is None else numbers_of("--k", k)
    template, tasks = ChatTemplate.load(model), []
    for path, most, responses in zip(data, _each("--limit", limit, data), _each("--n", n, data), strict=True):
        benchmark = load_benchmark(path, template, limit=most, needs_reference=needs_reference, **asdict(prompts))
        given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        given = {key: value for key, value in given.items() if value is not None}
        tasks.append(plan_task(model, benchmark, template, n=responses, top_k=top_k, seed=engine.seed, **given))
    evaluated = answer(
        model,
        tasks,
        template,
        folder,
        options=options,
        dtype=engine.dtype_for(model),
        rewards=rewards,
        ks=ks,
        progress=engine.progress,
    )
    show(evaluated)
    resumed = sum(one.resumed for one in evaluated)
    responses = sum(len(one.task.benchmark.problems) * one.task.n for one in evaluated)
    print(f"wrote {folder / RESULTS}: {responses} responses{earlier(resumed)}")
    return 0


def _lm_eval(task: Path, model: Path, folder: Path, engine: EngineOptions, limit: int | None) -> int:
    """A task of lm-evaluation-harness: its metrics on the terminal, and as JSON."""
    import json

    from megapsft.checkpoint.hf import read_config
    from megapsft.data.chat_template import ChatTemplate
    from megapsft.evaluate.engine import open_engine
    from megapsft.evaluate.harness import Answers, need_lm_eval, run_task
    from megapsft.output.whole import write_whole

    need_lm_eval()
    template = ChatTemplate.load(model)
    with open_engine(model, engine.resolved(), engine.dtype_for(model), folder / "servers") as opened:
        answers = Answers(opened, template, read_config(model).max_position_embeddings, engine.seed)
        found = run_task(task, answers, limit=limit)
    path = folder / f"lm-eval-{task.stem}.json"
    write_whole(path, json.dumps(found, indent=1, default=str) + "\n")
    for name, value in found.items():
        print(f"{name}: {value}")
    print(f"wrote {path}")
    return 0


def _each(option: str, numbers: tuple[int, ...], files: tuple[Path, ...]) -> list[int | None]:
    """A number for each file; None where none was given."""
    if len(numbers) not in (0, 1, len(files)):
        rule = f"has {len(numbers)} numbers for {len(files)} files"
        raise Refused(f"{option} {' '.join(map(str, numbers))}", rule, "give one for all, or one for each")
    return list(numbers or [None]) * (len(files) if len(numbers) < 2 else 1)
