"""The command line: the one file that knows every package. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megapsft.errors import Refused, TrainingStopped

if TYPE_CHECKING:
    from megapsft.checkpoint.convert.run import Result
    from megapsft.config import ParallelConfig, RolloutConfig
    from megapsft.platform.held_signal import HeldSignal
    from megapsft.train.plan import RunPlan
    from megapsft.train.run import Evaluation


def train(
    config: tyro.conf.Positional[Path],
    *,
    dry_run: bool = False,
    nproc_per_node: int | None = None,
) -> int:
    """Train: megapsft train CONFIG.yaml [key=value ...]. The same command on the same run.dir continues the run.

    For example:
        megapsft train configs/psft/tiny-qwen3-gsm8k.yaml data.path=train.jsonl model.path=models/tiny
        megapsft train configs/psft/tiny-qwen3-gsm8k.yaml parallel.tensor_model_parallel_size=2 train.steps=50
        megapsft train configs/psft/tiny-qwen3-gsm8k.yaml --dry-run
        torchrun --nproc-per-node 8 -m megapsft.cli train CONFIG.yaml     (or srun: it joins)

    SIGUSR1, or a file RUN/stop, ends it after the step that it is in, saved, to be continued (docs/queue.md).

    Args:
        config: YAML file; `key=value` arguments overlay it, `megapsft config` lists the keys.
        dry_run: check everything, print what would run, start nothing.
        nproc_per_node: processes to start here; default: the GPUs of this machine, or the fewest that the split needs.
    """
    from megapsft.platform.held_signal import HeldSignal

    asked = None if dry_run else HeldSignal(signal.SIGUSR1)  # before the imports, which take seconds
    from megapsft.config import load_config
    from megapsft.platform.launch import become_world_of_one, torchrun
    from megapsft.report.plan import show_plan
    from megapsft.train.plan import plan_run, run_folder
    from megapsft.train.stop import STOPPED, ask, was_stopped, withdraw

    resolved = load_config(config, OVERRIDES)
    world, joined = _world(resolved.parallel, nproc_per_node)
    plan = plan_run(resolved, world)  # refuses at the door, before any process starts
    evaluation = None
    if resolved.evaluate.data:
        from megapsft.evaluate.during_training import DuringTraining

        evaluation = DuringTraining(plan)
    if _is_first() and (dry_run or not joined):
        show_plan(plan, whole=dry_run)
    if dry_run:
        return 0
    folder = run_folder(resolved)
    if world > 1 and not joined:
        with asked.passed_on(lambda: ask(folder)):
            code = torchrun(world, ["train", str(config), *OVERRIDES])
        if code == 0:
            withdraw(folder)  # what came when there was nobody left to ask
    else:
        if not joined:
            become_world_of_one()
        code = _train_here(plan, evaluation, asked)
    if not joined and code == 0 and was_stopped(folder):
        return STOPPED  # where it joined: 0, for torchrun and srun take anything else for a failure, and end the other ranks
    return code


def _train_here(plan: RunPlan, evaluation: Evaluation | None, asked: HeldSignal) -> int:
    """As one rank of the world that the environment describes."""
    from megapsft import parallel
    from megapsft.platform.compat import hush
    from megapsft.train.loop import train as loop
    from megapsft.train.run import start

    hush()
    parallel.initialize(plan.mesh, plan.config.parallel, plan.config.train.seed)
    run = start(plan, evaluation, asked.came)
    try:
        loop(run)
    except TrainingStopped as error:  # on all ranks at once
        run.close()
        parallel.shutdown()
        return _complain(error)
    if _is_first():
        done, stopped = run.done, f"; stopped by {run.stopped}, the same command goes on" if run.stopped else ""
        counts = f"{done.step} steps, {done.update} updates, {done.skipped_updates} of them skipped"
        print(f"{plan.config.run.dir}: {counts}{stopped}")
    parallel.shutdown()
    return 0


def pipeline(config: tyro.conf.Positional[Path], *, dry_run: bool = False) -> int:
    """Train stages one after the other, and compare their models: megapsft pipeline CONFIG.yaml [STAGE.key=value ...].

    For example:
        megapsft pipeline configs/pipelines/psft-grpo.yaml
        megapsft pipeline configs/pipelines/psft-grpo.yaml run.dir=runs/other grpo.train.steps=100
        megapsft pipeline configs/pipelines/psft-grpo.yaml --dry-run

    Interrupted or killed, it goes on from there when it is run again.

    Args:
        config: YAML file; `STAGE.key=value` overlays the config of a stage, `run.dir=`, `model=` and `compare.key=` the file.
        dry_run: check everything, print what would run, start nothing.
    """
    from megapsft.pipeline.config import load_pipeline
    from megapsft.pipeline.plan import plan_pipeline
    from megapsft.pipeline.run import run_pipeline
    from megapsft.pipeline.show import show_pipeline
    from megapsft.platform.launch import joined_world

    if joined_world() is not None:
        raise Refused("a pipeline as one of several ranks", "starts the ranks of its stages itself", "start it once, by itself")
    plan = plan_pipeline(load_pipeline(config, OVERRIDES))
    show_pipeline(plan)
    return 0 if dry_run else run_pipeline(plan)


def probe(
    config: tyro.conf.Positional[Path],
    *,
    samples: int | None = None,
    out: Path | None = None,
    plot: Path | None = None,
    nproc_per_node: int | None = None,
) -> int:
    """Measure how far ratios are from 1 before any update: megapsft probe CONFIG.yaml [key=value ...]. Nothing is trained.

    For example:
        megapsft probe configs/psft/tiny-qwen3-gsm8k.yaml data.path=train.jsonl model.dtype=bfloat16
        megapsft probe configs/psft/tiny-qwen3-moe-gsm8k.yaml --samples 32 --out probe.json --plot probe.png
        torchrun --nproc-per-node 8 -m megapsft.cli probe CONFIG.yaml     (or srun: it joins)

    Args:
        config: YAML file; `key=value` arguments overlay it, `megapsft config` lists the keys.
        samples: rows of the data, the first in the order of the run; default: those of its first update.
        out: JSON to write.
        plot: PNG to draw: how ratios are spread, and the clip range.
        nproc_per_node: processes to start here; default: the GPUs of this machine, or the fewest that the split needs.
    """
    from megapsft.config import RunConfig, load_config
    from megapsft.platform.launch import become_world_of_one, torchrun
    from megapsft.report.probe import need_matplotlib
    from megapsft.train.plan import plan_run
    from megapsft.train.probe import first_groups

    if plot is not None:
        need_matplotlib()
    resolved = load_config(config, OVERRIDES)
    if resolved.run.dir:  # one that is never made: what stands in run.dir is another run than that of a probe
        resolved = replace(resolved, run=RunConfig(dir=str(Path(resolved.run.dir) / "probe")))
    world, joined = _world(resolved.parallel, nproc_per_node)
    plan = plan_run(resolved, world)
    first_groups(plan, samples)  # refuses at the door too
    if world > 1 and not joined:
        options = {"--samples": samples, "--out": out, "--plot": plot}
        given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
        return torchrun(world, ["probe", str(config), *OVERRIDES, *given])
    if not joined:
        become_world_of_one()
    return _probe_here(plan, samples, out, plot)


def _probe_here(plan: RunPlan, samples: int | None, out: Path | None, plot: Path | None) -> int:
    """As one rank of the world that the environment describes; the first one reports."""
    from megapsft import parallel
    from megapsft.platform.compat import hush
    from megapsft.report.probe import draw_probe, show_probe, write_probe
    from megapsft.train.probe import measure_noise

    hush()
    parallel.initialize(plan.mesh, plan.config.parallel, plan.config.train.seed)
    measured = measure_noise(plan, samples)
    if _is_first():
        show_probe(measured)
        if out is not None:
            write_probe(measured, plan, out)
            print(f"wrote {out}")
        if plot is not None:
            draw_probe(measured, plan, plot)
            print(f"drew {plot}")
    parallel.shutdown()
    return 0


def export(
    run: tyro.conf.Positional[Path],
    *,
    out: Path,
    checkpoint: str = "latest",
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
) -> int:
    """Write a run's weights as a Hugging Face folder, with config, tokenizer and chat template; bounded memory, no GPU.

    For example:
        megapsft export runs/tiny --out exports/tiny
        megapsft export runs/tiny --out exports/best --checkpoint best --dtype bf16

    Args:
        run: the run's folder.
        out: the folder to make; it must not hold anything yet.
        checkpoint: latest, best, or a folder name under RUN/checkpoints such as step-00000050.
        dtype: of the exported weights; default: that of the run.
    """
    from megapsft.checkpoint.export import export_run

    return _converted(False, export_run(run, out, checkpoint, dtype))


def init_model(
    *,
    family: str,
    data: Path,
    out: Path,
    vocab_size: int = 512,
    hidden_size: int = 96,
    num_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    head_dim: int = 24,
    intermediate_size: int = 256,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    moe_intermediate_size: int = 64,
    max_position_embeddings: int = 4096,
    tie_word_embeddings: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 1234,
) -> int:
    """Make a small random Hugging Face checkpoint, with a tokenizer trained on your data.

    For example:
        megapsft init-model --family qwen3_moe --data train.jsonl --out models/tiny
        megapsft init-model --family llama --data train.parquet --vocab-size 2048 --hidden-size 256 --out models/larger

    Args:
        family: qwen3, qwen3_moe, qwen2 or llama.
        data: .jsonl or .parquet; the tokenizer is trained on all its texts, whatever the columns.
        out: the folder to make; it must not hold anything yet.
    """
    options = dict(locals())
    from megapsft.checkpoint.random_init import init_model as make

    made = make(data_path=options.pop("data"), out_dir=options.pop("out"), **options)
    print(f"made {made}")
    return 0


def make_data(
    *,
    out: Path,
    kind: Literal["demonstrations", "preferences", "rollouts"] = "demonstrations",
    count: int | None = None,
    seed: int = 0,
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    rollouts_per_prompt: int | None = None,
    level: Literal["worded", "easy"] | None = None,
) -> int:
    """Write worded arithmetic problems with worked solutions, as JSONL: to be demonstrations, preferences or rollouts.

    For example:
        megapsft make-data --out train.jsonl --count 4000
        megapsft make-data --kind preferences --out pairs.jsonl
        megapsft make-data --kind rollouts --from gsm8k-train.jsonl --rollouts-per-prompt 8 --out rollouts.jsonl

    Args:
        out: the file to write.
        kind: what data.kind is then; demonstrations have the columns `question` and `answer`, the others those of the defaults.
        count: problems, no two alike; default: 2000, or all of the file.
        seed: the same seed gives the same file.
        from_: JSONL with the columns of GSM8K, whose problems are taken; default: problems are made up.
        rollouts_per_prompt: where kind=rollouts; default: 4.
        level: of problems that are made up; easy ones have one sum or difference, worded ones (the default) up to three steps.
    """
    from megapsft.data.arithmetic import generate, preferences, read_problems, rollouts, write_jsonl

    if kind != "rollouts" and rollouts_per_prompt is not None:
        raise Refused(f"--rollouts-per-prompt {rollouts_per_prompt}", f"is not read where --kind {kind}", "use --kind rollouts")
    if count is not None and count < 1:
        raise Refused(f"--count {count}", "must be 1 or more", "leave it out for as many as there are")
    if level is not None and from_ is not None:
        raise Refused(f"--level {level}", f"is not read where --from {from_}", "leave out one of the two")
    if from_ is None:
        problems = generate(2000 if count is None else count, seed, level or "worded")
    else:
        problems = read_problems(from_, count)
    rows = problems
    if kind == "preferences":
        rows = preferences(problems, seed)
    if kind == "rollouts":
        rows = rollouts(problems, seed, 4 if rollouts_per_prompt is None else rollouts_per_prompt)
    write_jsonl(out, rows)
    print(f"wrote {len(problems)} problems to {out}")
    return 0


def config(config: tyro.conf.Positional[Path | None] = None) -> int:
    """Print the resolved config: every key with its value.

    For example:
        megapsft config
        megapsft config configs/psft/tiny-qwen3-gsm8k.yaml train.steps=50

    Args:
        config: YAML file; defaults where there is none.
    """
    from megapsft.config import load_config
    from megapsft.train.plan import to_yaml

    print(to_yaml(load_config(config, OVERRIDES)), end="")
    return 0


def plan(
    config: tyro.conf.Positional[Path],
    *,
    nodes: int = 1,
    gpus_per_node: int = 8,
    gpu: str = "h100",
    model: Path | None = None,
    proposals: int = 5,
    json: Path | None = None,
) -> int:
    """Say what a run takes of a cluster: megapsft plan CONFIG.yaml [key=value ...]. No GPU, no data and no weights are needed.

    For example:
        megapsft plan configs/psft/qwen3-30b-a3b.yaml --nodes 4 --gpus-per-node 8 --gpu h100
        megapsft plan configs/psft/qwen3-30b-a3b.yaml --nodes 2 parallel.pipeline_model_parallel_size=4 --json plan.json
        megapsft plan CONFIG.yaml --model models/Qwen3-8B --gpu h200

    Memory by rank and pipeline stage, time of a step, traffic, and splits that fit, ranked. Exit code 2 where it does not fit.

    Args:
        config: YAML file; `key=value` arguments overlay it, `megapsft config` lists the keys.
        nodes: machines.
        gpus_per_node: GPUs of each.
        gpu: a100, h100, h200 or b200.
        model: a folder with config.json; default: model.path, or the shape of that name in configs/models.
        proposals: splits to propose; 0: none.
        json: file to write it all to.
    """
    from megapsft.cluster.estimate import estimate
    from megapsft.cluster.hardware import Machines, gpu_named
    from megapsft.cluster.model_folder import shape_of_model
    from megapsft.cluster.propose import propose
    from megapsft.cluster.show import show_estimate, show_proposals, write_estimate
    from megapsft.config import load_config

    resolved = load_config(config, OVERRIDES)
    machines = Machines(gpu=gpu_named(gpu), nodes=nodes, gpus_per_node=gpus_per_node)
    hf = shape_of_model(config, resolved.model.path, model)
    if proposals < 0:
        raise Refused(f"--proposals {proposals}", "must be 0 or more", "leave it out for 5")
    others = propose(resolved, hf, machines, proposals) if proposals else None
    try:
        found = estimate(resolved, hf, machines)
    except Refused:
        if others:
            show_proposals(others)
        raise
    show_estimate(found, others)
    if json is not None:
        write_estimate(found, others, json)
        print(f"wrote {json}")
    return 0 if found.fits else 2


def curves(runs: tyro.conf.Positional[tuple[Path, ...]], *, out: Path) -> int:
    """Draw the curves of one run or several into a PNG, and print a table of their phases.

    For example:
        megapsft curves runs/sft runs/psft --out curves.png

    Args:
        runs: the runs' folders.
        out: the PNG to write.
    """
    from rich.console import Console

    from megapsft.report.curves import draw_curves
    from megapsft.report.table import phase_table

    for run in runs:
        Console().print(phase_table(run / "metrics.jsonl"))
    draw_curves({run.name: run / "metrics.jsonl" for run in runs}, out)
    print(f"drew {out}")
    return 0


def rollout(
    *,
    model: Path,
    data: Path,
    out: Path,
    n: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = -1,
    max_tokens: int = 512,
    seed: int = 0,
    limit: int | None = None,
    prompt_column: str | None = None,
    reference_column: str | None = None,
    system_prompt: str | None = None,
    reward: tuple[str, ...] = (),
    engine: Literal["inprocess", "sglang"] = "inprocess",
    url: tuple[str, ...] = (),
    servers: int | None = None,
    tensor_parallel_size: int | None = None,
    max_batch_size: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    progress: bool = True,
) -> int:
    """Sample responses to the prompts of a file, into a JSONL that data.kind=rollouts reads.

    For example:
        megapsft rollout --model models/tiny --data prompts.jsonl --out rollouts.jsonl
        megapsft rollout --model models/tiny --data train.jsonl --out rollouts.jsonl --n 4 --reward math_answer
        megapsft rollout --model Qwen3-8B --data train.jsonl --out rollouts.jsonl --engine sglang --tensor-parallel-size 2

    Killed, it goes on from there when it is run again; no response is asked for twice.

    Args:
        model: Hugging Face folder with a tokenizer and a chat template.
        data: .jsonl or .parquet.
        out: the .jsonl to write; the options lie beside it as .json.
        n: responses to each prompt.
        temperature: 0 is greedy.
        top_p: tokens are drawn from the most probable ones that have so much together.
        top_k: tokens are drawn from so many; -1: from all.
        max_tokens: of a response.
        seed: of the in-process engine: the same gives the same responses.
        limit: only the first prompts.
        prompt_column: default: what problems are usually called.
        reference_column: with the right answer, for --reward; default: what answers are usually called.
        system_prompt: put before prompts that have no system turn.
        reward: names of rewards, such as math_answer, or path/to/file.py; their sum is written with each rollout.
        engine: this process; or SGLang servers.
        url: sglang: servers that run already, with the weights of --model; default: they are started here.
        servers: sglang: how many are started here; default: 1.
        tensor_parallel_size: sglang: of each server that is started here; default: 1.
        max_batch_size: inprocess: responses at once, which bounds the cache of keys and values; default: 64.
        dtype: of the weights while sampling; default: as stored.
        progress: show a bar.
    """
    from megapsft.data.chat_template import ChatTemplate
    from megapsft.evaluate.batch_inference import rollout as sample
    from megapsft.evaluate.benchmark import load_benchmark
    from megapsft.evaluate.engine import dtype_of
    from megapsft.rewards.registry import build_reward
    from megapsft.rollout.base import Sampling

    options = _engine_options(engine, url, servers, tensor_parallel_size, max_batch_size)
    rewards = [{"name": name} for name in reward]
    template = ChatTemplate.load(model)
    prompts = load_benchmark(
        data,
        template,
        limit=limit,
        prompt_column=prompt_column,
        reference_column=reference_column,
        system_prompt=system_prompt,
        needs_reference=any(build_reward(entry)[1].needs_reference for entry in rewards),
    )
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        stop_token_ids=template.stop_token_ids,
        seed=seed,
    )
    written = sample(
        model,
        prompts,
        template,
        out,
        n=n,
        sampling=sampling,
        options=options,
        dtype=dtype or dtype_of(model),
        rewards=rewards,
        progress=progress,
    )
    print(f"wrote {out}: {written.responses} responses to {written.prompts} prompts{_resumed(written.resumed)}")
    return 0


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
    seed: int = 0,
    prompt_column: str | None = None,
    reference_column: str | None = None,
    system_prompt: str | None = None,
    reward: tuple[str, ...] = ("math_answer",),
    engine: Literal["inprocess", "sglang"] = "inprocess",
    url: tuple[str, ...] = (),
    servers: int | None = None,
    tensor_parallel_size: int | None = None,
    max_batch_size: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    progress: bool = True,
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
        seed: of the in-process engine: the same gives the same responses.
        prompt_column: default: what problems are usually called.
        reference_column: default: what answers are usually called.
        system_prompt: put before prompts that have no system turn.
        reward: names of rewards, or path/to/file.py; a response is right where their sum is 1.
        engine: this process; or SGLang servers.
        url: sglang: servers that run already, with the weights of --model; default: they are started here.
        servers: sglang: how many are started here; default: 1.
        tensor_parallel_size: sglang: of each server that is started here; default: 1.
        max_batch_size: inprocess: responses at once, which bounds the cache of keys and values; default: 64.
        dtype: of the weights while sampling; default: as stored.
        progress: show a bar.
    """
    from megapsft.data.chat_template import ChatTemplate
    from megapsft.evaluate.benchmark import load_benchmark
    from megapsft.evaluate.engine import dtype_of
    from megapsft.evaluate.evaluation import RESULTS, plan_task, show
    from megapsft.evaluate.evaluation import evaluate as answer
    from megapsft.rewards.registry import build_reward

    options = _engine_options(engine, url, servers, tensor_parallel_size, max_batch_size)
    folder = Path("evaluations") / model.resolve().name if out is None else out
    if lm_eval is not None:
        of_data = {"--data": data, "--n": n, "--k": k, "--temperature": temperature, "--top-p": top_p, "--max-tokens": max_tokens,
                   "--prompt-column": prompt_column, "--reference-column": reference_column, "--system-prompt": system_prompt,
                   "--top-k": top_k != -1, "--reward": reward != ("math_answer",)}  # fmt: skip
        for option, value in of_data.items():
            if value not in (None, (), False):
                raise Refused(option, "is not read beside --lm-eval: the task says it", "leave it out")
        return _lm_eval(lm_eval, model, folder, options, dtype or dtype_of(model), _each("--limit", limit, (lm_eval,))[0], seed)
    rewards = [{"name": name} for name in reward]
    needs_reference = any(build_reward(entry)[1].needs_reference for entry in rewards)
    ks = None if k is None else _numbers("--k", k)
    template, tasks = ChatTemplate.load(model), []
    for path, most, responses in zip(data, _each("--limit", limit, data), _each("--n", n, data), strict=True):
        benchmark = load_benchmark(
            path,
            template,
            limit=most,
            prompt_column=prompt_column,
            reference_column=reference_column,
            system_prompt=system_prompt,
            needs_reference=needs_reference,
        )
        given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        given = {key: value for key, value in given.items() if value is not None}
        tasks.append(plan_task(model, benchmark, template, n=responses, top_k=top_k, seed=seed, **given))
    evaluated = answer(
        model, tasks, template, folder, options=options, dtype=dtype or dtype_of(model), rewards=rewards, ks=ks, progress=progress
    )
    show(evaluated)
    resumed = sum(one.resumed for one in evaluated)
    responses = sum(len(one.task.benchmark.problems) * one.task.n for one in evaluated)
    print(f"wrote {folder / RESULTS}: {responses} responses{_resumed(resumed)}")
    return 0


def _lm_eval(
    task: Path,
    model: Path,
    folder: Path,
    options: RolloutConfig,
    dtype: Literal["float32", "bfloat16"],
    limit: int | None,
    seed: int,
) -> int:
    """A task of lm-evaluation-harness: its metrics on the terminal, and as JSON."""
    import json

    from megapsft.checkpoint.hf import read_config
    from megapsft.data.chat_template import ChatTemplate
    from megapsft.evaluate.engine import open_engine
    from megapsft.evaluate.harness import Answers, need_lm_eval, run_task

    need_lm_eval()
    template = ChatTemplate.load(model)
    with open_engine(model, options, dtype, folder / "servers") as opened:
        answers = Answers(opened, template, read_config(model).max_position_embeddings, seed)
        found = run_task(task, answers, limit=limit)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"lm-eval-{task.stem}.json"
    path.write_text(json.dumps(found, indent=1, default=str) + "\n")
    for name, value in found.items():
        print(f"{name}: {value}")
    print(f"wrote {path}")
    return 0


def _resumed(count: int) -> str:
    return f", {count} of them by an earlier attempt" if count else ""


def _engine_options(
    engine: Literal["inprocess", "sglang"],
    url: tuple[str, ...],
    servers: int | None,
    tensor_parallel_size: int | None,
    max_batch_size: int | None,
) -> RolloutConfig:
    """What was said of the engine; options of the other one, or of servers that are not started, are refused."""
    from megapsft.config import RolloutConfig

    of_started = {"servers": servers, "tensor_parallel_size": tensor_parallel_size}
    given = {"urls": url or None, **of_started, "max_batch_size": max_batch_size}
    given = {key: value for key, value in given.items() if value is not None}
    read = {"inprocess": {"max_batch_size"}, "sglang": {"urls", *of_started}}[engine]
    for key, value in given.items():
        option = "--url" if key == "urls" else "--" + key.replace("_", "-")
        if key not in read:
            raise Refused(f"{option} {value}", f"is not read where --engine {engine}", "leave it out, or use the other engine")
        if url and key in of_started:
            raise Refused(f"{option} {value}", "is of servers that are started here, and --url names others", "leave one out")
        if key != "urls" and value < 1:
            raise Refused(f"{option} {value}", "must be 1 or more", "leave it out for the default")
    # weights are never updated here: the ways that need servers on this host are none
    return RolloutConfig(engine=engine, weight_update="disk" if url else "tensor", **given)


def _each(option: str, numbers: tuple[int, ...], files: tuple[Path, ...]) -> list[int | None]:
    """A number for each file; None where none was given."""
    if len(numbers) not in (0, 1, len(files)):
        rule = f"has {len(numbers)} numbers for {len(files)} files"
        raise Refused(f"{option} {' '.join(map(str, numbers))}", rule, "give one for all, or one for each")
    return list(numbers or [None]) * (len(files) if len(numbers) < 2 else 1)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise Refused(f"{option} {text}", "is not a list of numbers", f"write {option} 1,8,32") from None


def hf_to_megatron(
    *,
    hf: Path,
    out: Path,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    adapter: Path | None = None,
    keep_adapter: bool = False,
    max_memory: str | None = None,
    workers: int = 4,
    verify: bool = False,
    dry_run: bool = False,
) -> int:
    """Convert a Hugging Face folder to a torch_dist checkpoint that Megatron loads under any split. No GPU, bounded memory.

    For example:
        megapsft convert hf-to-megatron --hf Qwen3-30B-A3B --out ckpt
        megapsft convert hf-to-megatron --hf Qwen3-30B-A3B --out ckpt --dtype bf16 --max-memory 1GiB --workers 8
        megapsft convert hf-to-megatron --hf Qwen3-30B-A3B --out merged --adapter lora
        megapsft train CONFIG.yaml model.path=ckpt

    Killed, it goes on from there when it is run again.

    Args:
        hf: folder with config.json and safetensors; FP8 weights in blocks are read with their scales.
        out: the folder to make; it must not hold anything yet.
        dtype: of the checkpoint; default: as stored, FP8 as bf16.
        adapter: folder of a LoRA adapter that PEFT saved, which is merged into the weights.
        keep_adapter: do not merge it, but keep it beside the base; megatron-to-hf gives it back.
        max_memory: that the process may have, with all it needs; default: 600MiB.
        workers: threads that read and write.
        verify: read the result back, and compare it with the source bit by bit.
        dry_run: check everything, say what would be written, write nothing.
    """
    from megapsft.checkpoint.convert import hf_to_megatron as to_megatron
    from megapsft.checkpoint.convert.workers import Options

    options = Options(max_memory=_memory(max_memory), workers=workers, read_back=verify, dry_run=dry_run)
    return _converted(dry_run, to_megatron.hf_to_megatron(hf, out, dtype, adapter, keep_adapter, options))


def megatron_to_hf(
    *,
    megatron: Path,
    out: Path,
    hf: Path | None = None,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    fp8_blockwise: bool = False,
    max_shard_size: str = "5GB",
    max_memory: str | None = None,
    workers: int = 4,
    verify: bool = False,
    dry_run: bool = False,
) -> int:
    """Convert a torch_dist checkpoint, saved under any split, to a Hugging Face folder. No GPU, bounded memory.

    For example:
        megapsft convert megatron-to-hf --megatron runs/x/checkpoints/latest --out hf
        megapsft convert megatron-to-hf --megatron runs/x --out hf --dtype bf16
        megapsft convert megatron-to-hf --megatron megatron-lm/save --hf Qwen3-30B-A3B --out hf

    Killed, it goes on from there when it is run again.

    Args:
        megatron: a run, one of its checkpoints, what hf-to-megatron made, or Megatron-LM's --save.
        out: the folder to make; it must not hold anything yet.
        hf: folder with config.json and tokenizer; default: that of the model the run trained, or the import converted.
        dtype: of the weights; default: as stored.
        fp8_blockwise: linear layers in FP8 (e4m3), with a scale for each block of 128 x 128, as SGLang and vLLM read them.
        max_shard_size: most bytes of weights in a file.
        max_memory: that the process may have, with all it needs; default: 600MiB.
        workers: threads that read and write.
        verify: read the result back, and compare it with the source bit by bit.
        dry_run: check everything, say what would be written, write nothing.
    """
    from megapsft.checkpoint.convert import megatron_to_hf as to_hf
    from megapsft.checkpoint.convert.workers import Options

    options = Options(max_memory=_memory(max_memory), workers=workers, read_back=verify, dry_run=dry_run)
    return _converted(dry_run, to_hf.megatron_to_hf(megatron, out, hf, dtype, fp8_blockwise, _size(max_shard_size), options))


def verify(
    *,
    hf: Path,
    against: Path,
    model: Path | None = None,
    logits: bool = False,
    max_memory: str | None = None,
    workers: int = 4,
) -> int:
    """Compare a Hugging Face folder with another, or with a checkpoint: config, names, shapes, every bit, and the manifests.

    For example:
        megapsft convert verify --hf exports/x --against runs/x/checkpoints/latest
        megapsft convert verify --hf exports/x --against Qwen3-30B-A3B --logits

    Exit code 0 where all is the same, 1 where something differs.

    Args:
        hf: folder with config.json and safetensors.
        against: another one, a run, one of its checkpoints, what hf-to-megatron made, or Megatron-LM's --save.
        model: folder with the config of `against`, where it is a checkpoint that does not say it itself.
        logits: also run both on a sample of tokens, the folder in transformers; both models must fit into memory.
        max_memory: that the process may have, with all it needs, but for --logits; default: 600MiB.
        workers: threads that read.
    """
    from rich.filesize import decimal

    from megapsft.checkpoint.convert.verify import verify as compare
    from megapsft.checkpoint.convert.workers import Options

    report = compare(hf, against, model, Options(max_memory=_memory(max_memory), workers=workers))
    if logits:
        from megapsft.checkpoint.convert.logits import compare_logits

        compare_logits(hf, against, model, report)
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"DIFFERENT: {problem}")
    print(f"{report.equal} of {report.tensors} tensors are equal bit by bit, {decimal(report.nbytes)} read")
    return 1 if report.problems else 0


def _memory(text: str | None) -> int | None:
    return None if text is None else _size(text)


def _size(text: str) -> int:
    from megapsft.checkpoint.convert.memory import parse_size

    return parse_size(text)


def _converted(dry_run: bool, result: Result) -> int:
    from rich.filesize import decimal

    for text in result.warnings:
        print(f"megapsft: warning: {text}", file=sys.stderr)
    for name, count in list(result.nonfinite.items())[:10]:
        print(f"megapsft: warning: {name} has {count} numbers that are infinite or not a number", file=sys.stderr)
    if len(result.nonfinite) > 10:
        print(f"megapsft: warning: and {len(result.nonfinite) - 10} more tensors have such, see conversion.json", file=sys.stderr)
    done = "would write" if dry_run else "wrote"
    print(f"{done} {result.out}: {result.tensors} tensors{_resumed(result.resumed)}, {decimal(result.nbytes)}")
    return 0


def convert(*arguments: str) -> int:
    """Convert weights from Hugging Face to Megatron and back, and compare them: megapsft convert --help.

    For example:
        megapsft convert hf-to-megatron --hf Qwen3-30B-A3B --out ckpt
        megapsft convert megatron-to-hf --megatron runs/x --out hf
        megapsft convert verify --hf hf --against runs/x

    Args:
        arguments: which conversion, and its options.
    """
    about = "Convert weights from Hugging Face to Megatron and back, and compare them."
    return tyro.extras.subcommand_cli_from_dict(CONVERT, prog="megapsft convert", args=arguments, description=about)


COMMANDS = {
    "train": train,
    "pipeline": pipeline,
    "probe": probe,
    "export": export,
    "convert": convert,
    "init-model": init_model,
    "make-data": make_data,
    "config": config,
    "plan": plan,
    "curves": curves,
    "rollout": rollout,
    "evaluate": evaluate,
}
CONVERT = {
    "hf-to-megatron": hf_to_megatron,
    "megatron-to-hf": megatron_to_hf,
    "verify": verify,
}
OVERRIDES: list[str] = []  # the key=value arguments: they may stand anywhere, which argparse does not allow


def _is_override(argument: str) -> bool:
    """`key=value`, and neither an option nor a path with an = in it."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and not key.startswith("-") and "/" not in key


def _world(parallel: ParallelConfig, nproc_per_node: int | None) -> tuple[int, bool]:
    """How many processes there are or are to be, and whether this is one of them already."""
    from megapsft.parallel import smallest_world
    from megapsft.platform.launch import die_with_launcher, joined_world

    if nproc_per_node is not None and nproc_per_node < 1:
        raise Refused(f"--nproc-per-node {nproc_per_node}", "must be 1 or more", "leave it out for as many as the split needs")
    die_with_launcher()
    joined = joined_world()
    return joined or nproc_per_node or max(smallest_world(parallel), _gpus()), bool(joined)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _complain(error: Exception) -> int:
    if _is_first():
        print(f"megapsft: {error}", file=sys.stderr)
    return 2 if isinstance(error, Refused) else 3


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 where something was refused, 3 where training stopped itself, 75 where it was
    asked to stop. A rank that hangs ends with 70.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["train"], ["pipeline"], ["probe"], ["config"], ["plan"]):
        OVERRIDES[:] = [a for a in arguments[1:] if _is_override(a)]
        arguments = [a for a in arguments if a not in OVERRIDES]
    try:
        if arguments[:1] == ["convert"]:
            return convert(*arguments[1:])
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="megapsft", args=arguments, description=__doc__)
    except Refused as error:
        return _complain(error)
    except KeyboardInterrupt:
        if _is_first():
            print("megapsft: interrupted; the same command again goes on from there, or begins again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
