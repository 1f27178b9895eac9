"""Rollouts: tokens a second of both engines beside `transformers`, weight updates beside a memcpy, their share of an RL step.

    python benchmarks/rollout.py --json docs/results/rollout.json --plot docs/results/rollout.png     # about 10 minutes, 4 GB
    python benchmarks/rollout.py --quick                                                              # small: 2 minutes

SGLang is the real server, started here (`make sglang`, or MEGAPSFT_SGLANG_PYTHON). Three parts, one run:

    sampling    the same prompts, 4 responses each of as many tokens as are asked for, at temperature 1, without a stop token,
                at most `--batch` at once: our in-process engine, our SGLang engine with its server, and `generate` of
                transformers, its prompts padded on the left. Other prompts every round, as a server keeps what it has seen.
                Both engines return log-probabilities, transformers is not asked for them.
    updates     the exporter's stream of a larger model to a server, until it samples from the checked weights, each way; beside
                a clone of the same tensors, which takes fresh memory, a copy into memory that is there, and the stream alone.
                The weights are others each time, so that a way which sent nothing would fail at the checksums.
    steps       `megapsft train` of the shipped GRPO config with each engine and a random reward: what share of its steps
                training waits for rollouts, and for the engine to get weights.

In the first two all take turns, in another order every round: what else the machine does then slows all, and ratios are of one
round. CPU seconds are of this process and, where a server is asked, of all its processes. While others have their turn the
server must be idle: that is measured too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from megapsft.checkpoint.hf import export_stream
from megapsft.checkpoint.random_init import init_model
from megapsft.config import RolloutConfig
from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.evaluate.engine import open_engine
from megapsft.metrics.records import read_records
from megapsft.policy.build import Policy
from megapsft.report.figure import Bars, Series
from megapsft.report.stored import write_measurement
from megapsft.rollout.base import Engine, Request, Sampling
from megapsft.rollout.sglang.engine import SGLang
from megapsft.rollout.sglang.server import find_python

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/grpo/tiny-qwen3-arithmetic.yaml"
N = 4  # responses to each prompt
WAYS = ("tensor", "distributed", "disk")  # of rollout.weight_update
KEPT = "tensor, copy kept"  # as where the run starts its servers: they start again from a copy on disk

WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of this process: a run makes its own

Prompts = list[tuple[int, ...]]
Stream = Iterator[tuple[str, Tensor]]
Found = dict[str, list[dict[str, float]]]  # what took turns -> its figures of each round


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; all counts."""

    prompts: int = 64
    tokens: int = 64  # of each response
    batch: int = 64  # responses at once
    rounds: int = 5
    layers: int = 8  # of the larger model: 28 MB each in fp32
    steps: int = 6  # of GRPO, the first of which is not counted


QUICK = Sizes(prompts=4, tokens=8, rounds=2, layers=1, steps=3)


def turns(names: Sequence[str], number: int) -> list[str]:
    """All names, each round beginning with another."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def process_group_cpu(leader: int) -> float:
    """CPU seconds so far of the processes of a group that are alive (Linux)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == leader:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def timed(call: Callable[[], Any], leader: int) -> tuple[dict[str, float], Any]:
    """Wall and CPU seconds of a call, and what it returned."""
    server, own, begin = process_group_cpu(leader), time.process_time(), time.perf_counter()
    answer = call()
    seconds = time.perf_counter() - begin
    cpu = {"own_cpu_seconds": time.process_time() - own, "server_cpu_seconds": process_group_cpu(leader) - server}
    return {"seconds": seconds, **cpu}, answer


# sampling


def sampling(model: Path, work: Path, sizes: Sizes) -> dict[str, Any]:

    limits = ("--max-running-requests", str(sizes.batch), "--max-total-tokens", str(sizes.batch * 512))
    inprocess, served = RolloutConfig(max_batch_size=sizes.batch), RolloutConfig(engine="sglang", server_args=limits)
    options = Sampling(max_tokens=sizes.tokens)
    with open_engine(model, served, "float32", work) as server, open_engine(model, inprocess, "float32", work) as own:
        leader = server.engine.servers[0].process.pid
        tokenizer, generate = transformers_generate(model, sizes)

        def by(engine: Engine) -> Callable[[Prompts], list[int]]:
            def call(prompts: Prompts) -> list[int]:
                requests = [Request(prompt_ids=prompt, number=number) for prompt in prompts for number in range(N)]
                return [len(rollout.response_ids) for rollout in engine.generate(requests, options)]

            return call

        calls = {"in process": by(own.engine), "SGLang": by(server.engine), "transformers": generate}
        for call in calls.values():
            call(prompts_of(tokenizer, 4, seed=0))
        found: Found = {name: [] for name in calls}
        for number in range(sizes.rounds):
            prompts = prompts_of(tokenizer, sizes.prompts, seed=number + 1)
            for name in turns(list(calls), number):
                figures, lengths = timed(lambda name=name, prompts=prompts: calls[name](prompts), leader)
                if lengths != [sizes.tokens] * (N * sizes.prompts):
                    raise RuntimeError(f"{name} did not do the same work: {len(lengths)} responses, of {set(lengths)} tokens")
                found[name].append(figures | {"tokens": sum(lengths)})
                print(f"sampling, round {number + 1}: {name:12} {sum(lengths) / figures['seconds']:8.0f} tokens/s", flush=True)
    return {"turns": found, **summary_of_sampling(found)}


def prompts_of(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> Prompts:

    return [tuple(tokenizer.encode(row["question"])) for row in generate(count, seed)]


def transformers_generate(model: Path, sizes: Sizes) -> tuple[PreTrainedTokenizerBase, Callable[[Prompts], list[int]]]:
    """The tokenizer, and what gives the lengths of N responses to each prompt."""

    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    peer.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=sizes.tokens, eos_token_id=None, pad_token_id=0
    )

    def generate(prompts: Prompts) -> list[int]:
        lengths: list[int] = []
        for start in range(0, len(prompts), sizes.batch // N):
            part = prompts[start : start + sizes.batch // N]
            widest = max(map(len, part))
            ids = torch.tensor([(0,) * (widest - len(prompt)) + prompt for prompt in part])
            mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in part])
            made = peer.generate(ids, attention_mask=mask, num_return_sequences=N)
            lengths += [made.shape[1] - widest] * len(made)
        return lengths

    return AutoTokenizer.from_pretrained(model), generate


def summary_of_sampling(found: Found) -> dict[str, Any]:
    """Medians, ratios to transformers of the same round, and how busy the server was in turns of others."""
    rows = {}
    for name, own in found.items():
        pairs = list(zip(own, found["transformers"], strict=True))
        ratios = [(a["tokens"] / a["seconds"]) / (b["tokens"] / b["seconds"]) for a, b in pairs]
        rows[name] = {
            "tokens_per_second": median(one["tokens"] / one["seconds"] for one in own),
            "over_transformers": median(ratios),
            "over_transformers_range": [min(ratios), max(ratios)],
            "cpu_seconds_per_1000_tokens": median(1000 * cpu_of(one, name == "SGLang") / one["tokens"] for one in own),
        }
    others = [one for name, own in found.items() if name != "SGLang" for one in own]
    idle = sum(one["server_cpu_seconds"] for one in others) / sum(one["seconds"] for one in others)
    return {"engines": rows, "server_cpu_while_others_run": idle}


def cpu_of(figures: dict[str, float], asked: bool) -> float:
    """CPU seconds, with those of the server where it was asked."""
    return figures["own_cpu_seconds"] + (figures["server_cpu_seconds"] if asked else 0.0)


# updates


def updates(model: Path, work: Path, sizes: Sizes) -> dict[str, Any]:

    rest = {"engine": "sglang", "health_interval": 3600.0}  # a check in an update of another engine would count as a miss
    with contextlib.ExitStack() as stack:
        starter = stack.enter_context(open_engine(model, RolloutConfig(**rest), "float32", work / "kept")).engine
        member = starter.servers[0]
        policy = stack.enter_context(open_engine(model, RolloutConfig(), "float32", work)).engine.policy
        engines = {KEPT: starter}
        for way in WAYS:
            options = RolloutConfig(urls=(member.url,), weight_update=way, **rest)
            engines[way] = SGLang(options, model, work=work / way, dtype="float32")
            stack.callback(engines[way].close)

        def stream() -> Stream:
            return export_stream(policy.chunks, policy.hf)

        weights = [tensor for _, tensor in stream()]
        there = [tensor.clone() for tensor in weights]
        size = sum(tensor.numel() * tensor.element_size() for tensor in weights)
        memory: dict[str, Callable[[], Any]] = {
            "clone": lambda: [tensor.clone() for tensor in weights],
            "copy": lambda: [to.copy_(tensor) for to, tensor in zip(there, weights, strict=True)],
            "stream": lambda: [None for _ in stream()],
        }
        found: Found = {name: [] for name in (*memory, *engines)}
        versions = itertools.count(1)
        for number in range(-1, sizes.rounds):  # one to warm up
            for name in turns(list(found), number):
                if name in memory:
                    figures, _ = timed(memory[name], member.process.pid)
                else:
                    figures = update(engines[name], policy, stream, next(versions), member.process.pid)
                    if figures["bytes"] != size:
                        raise RuntimeError(f"{name} sent {figures['bytes']} bytes of {size}")
                if number >= 0:
                    found[name].append(figures | {"bytes": size})
                    shown = f"{figures['seconds']:7.3f} s {size / figures['seconds'] / 1e6:8.0f} MB/s"
                    print(f"updates, round {number + 1}: {name:18} {shown}", flush=True)
    return {"bytes": size, "tensors": len(weights), "turns": found, "ways": summary_of_updates(found)}


def update(engine: SGLang, policy: Policy, stream: Callable[[], Stream], version: int, leader: int) -> dict[str, float]:
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.mul_(1.0001)
    figures, _ = timed(lambda: engine.load_weights(stream(), version), leader)
    last = engine.last_update
    if last.servers != 1:
        raise RuntimeError(f"{last.servers} servers have the weights, not 1")
    return figures | {"bytes": last.bytes, "paused_seconds": last.paused_seconds}


def summary_of_updates(found: Found) -> dict[str, dict[str, Any]]:
    """Medians, and how much longer than a clone in the same round."""
    rows = {}
    for name, own in found.items():
        asked = "paused_seconds" in own[0]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(own, found["clone"], strict=True)]
        rows[name] = {
            "seconds": median(one["seconds"] for one in own),
            "bytes_per_second": median(one["bytes"] / one["seconds"] for one in own),
            "time_over_clone": median(ratios),
            "time_over_clone_range": [min(ratios), max(ratios)],
            "cpu_seconds": median(cpu_of(one, asked) for one in own),
        }
        if asked:
            rows[name]["paused_seconds"] = median(one["paused_seconds"] for one in own)
    return rows


# steps


def steps(model: Path, data: Path, work: Path, sizes: Sizes) -> dict[str, Any]:

    rows = {}
    for name, engine in (("in process", "inprocess"), ("SGLang", "sglang")):
        run = work / engine
        arguments = run_of(engine, model, data, run, sizes.steps)
        print("megapsft " + " ".join(arguments), flush=True)
        environment = {key: value for key, value in os.environ.items() if key not in WORLD}
        done = subprocess.run([sys.executable, "-m", "megapsft.cli", *arguments], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"the run with {engine} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        rows[name] = shares(read_records(run / "steps.jsonl"))
    return rows


def run_of(engine: str, model: Path, data: Path, run: Path, count: int) -> list[str]:
    """Arguments of `megapsft` for so many steps of GRPO."""
    overrides = [f"model.path={model}", f"data.path={data}", f"run.dir={run}", f"train.steps={count}"]
    overrides += [f"rollout.engine={engine}", f"rewards=[{{name: {ROOT / 'benchmarks/random_reward.py'}}}]"]
    return ["train", str(CONFIG), *overrides]


def shares(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the time of all steps but the first, in which much is done for the first time."""
    later = records[1:]
    seconds = sum(record["perf/seconds"] for record in later)
    sampling_, weights = (
        sum(record[key] for record in later) / seconds for key in ("perf/rollout_wait_seconds", "perf/weight_update_seconds")
    )
    return {
        "steps": len(later),
        "seconds_a_step": seconds / len(later),
        "sampling": sampling_,
        "weight_update": weights,
        "rest": 1 - sampling_ - weights,
    }


# all of it


def make_models(work: Path, sizes: Sizes) -> dict[str, Path]:
    """Data; a tiny model; the same without an end of text, which would stop a server's responses; and a larger one."""

    made = {name: work / name for name in ("tiny", "endless", "larger")} | {"data": work / "train.jsonl"}
    write_jsonl(made["data"], generate(2000, 1, "easy"))
    init_model("qwen3", made["data"], made["tiny"], vocab_size=320)
    shutil.copytree(made["tiny"], made["endless"])
    for name in ("config.json", "generation_config.json"):
        file = made["endless"] / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))
    init_model(
        "qwen3", made["data"], made["larger"], vocab_size=320, hidden_size=768, num_layers=sizes.layers, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, intermediate_size=2304,
    )  # fmt: skip
    return made


def machine(threads: int) -> dict[str, Any]:

    ask = "import importlib.metadata as m; print(m.version('sglang'), m.version('torch'))"
    server = subprocess.run([str(find_python(None)), "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "threads": threads,
        "load_average_at_start": list(os.getloadavg()),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "megatron-core")},
        "sglang": server[0],
        "torch_of_sglang": server[1],
    }


def measure(work: Path, sizes: Sizes, threads: int) -> dict[str, Any]:

    torch.set_num_threads(threads)
    here, started = machine(threads), time.perf_counter()
    made = make_models(work, sizes)
    result = {
        "benchmark": "rollout",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": here,
        "settings": {**vars(sizes), "responses_a_prompt": N, "dtype": "float32"},
        "sampling": sampling(made["endless"], work / "sampling", sizes),
        "updates": updates(made["larger"], work / "updates", sizes),
        "steps": steps(made["tiny"], made["data"], work / "steps", sizes),
    }
    here["load_average_at_end"], result["seconds"] = list(os.getloadavg()), time.perf_counter() - started
    return result


def pictures(result: dict[str, Any]) -> list[Bars]:
    """Tokens a second, bytes a second, and what a step is made of."""
    engines, ways, shares = result["sampling"]["engines"], result["updates"]["ways"], result["steps"]
    size = f"{result['updates']['bytes'] / 1e6:.0f} MB"
    speed = Series(name="tokens/s", values=[round(row["tokens_per_second"]) for row in engines.values()])
    updates = Series(name="MB/s", values=[round(row["bytes_per_second"] / 1e6, 1) for row in ways.values()])
    parts = [
        Series(name=key.replace("_", " "), values=[100 * row[key] for row in shares.values()], colour=colour)
        for key, colour in (("sampling", 1), ("weight_update", 2), ("rest", None))
    ]
    return [
        Bars(name="sampling", title="sampling", x_label="engine", y_label="tokens/s", names=list(engines), series=[speed]),
        Bars(name="updates", title=f"weights of {size} on their way", x_label="way", y_label="MB/s", names=list(ways),
             series=[updates], note="clone, copy and stream are what memory gives; the others are updates of a server."),
        Bars(name="steps", title="what a GRPO step is made of", x_label="engine", y_label="% of a step", names=list(shares),
             series=parts, stacked=True),
    ]  # fmt: skip


def tables(result: dict[str, Any]) -> str:
    """Three, in Markdown."""
    engines = [("sampling", "tokens/s", "/ transformers", "lowest to highest", "CPU s / 1000 tokens")]
    for name, row in result["sampling"]["engines"].items():
        ratio, (low, high) = f"{row['over_transformers']:.2f}", row["over_transformers_range"]
        cpu = f"{row['cpu_seconds_per_1000_tokens']:.2f}"
        engines.append((name, f"{row['tokens_per_second']:,.0f}", ratio, f"{low:.2f} to {high:.2f}", cpu))
    ways = [("weights", "seconds", "MB/s", "time / clone", "lowest to highest", "CPU s", "paused, s")]
    for name, row in result["updates"]["ways"].items():
        low, high = row["time_over_clone_range"]
        paused = f"{row['paused_seconds']:.2f}" if "paused_seconds" in row else ""
        figures = (f"{row['seconds']:.2f}", f"{row['bytes_per_second'] / 1e6:,.0f}", f"{row['time_over_clone']:.1f}")
        ways.append((name, *figures, f"{low:.1f} to {high:.1f}", f"{row['cpu_seconds']:.2f}", paused))
    parts = [("GRPO with", "seconds a step", "waits for rollouts", "weight update", "rest")]
    for name, row in result["steps"].items():
        figures = (f"{row[key]:.1%}" for key in ("sampling", "weight_update", "rest"))
        parts.append((name, f"{row['seconds_a_step']:.2f}", *figures))
    return "\n\n".join(map(markdown, (engines, ways, parts)))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ("---", *["---:"] * (len(rows[0]) - 1)), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, help=f"(default: {default})")
    parser.add_argument("--threads", type=int, default=1, help="of each process; 1 is disturbed least by others on the machine")
    parser.add_argument("--quick", action="store_true", help=f"as {QUICK}, but for what is given")
    parser.add_argument("--scratch", type=Path, help="where to work, 2 GB; else the system's temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG; needs --json")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in vars(Sizes()) if getattr(options, name) is not None}
    if options.plot and not options.json:
        parser.error("--plot needs --json, of which it is the picture")
    sizes = Sizes(**vars(QUICK if options.quick else Sizes()) | given)
    if sizes.rounds < 1 or sizes.steps < 2 or sizes.batch < N:
        parser.error(f"rounds must be 1 or more, steps 2 or more, batch {N} or more")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of servers and runs that are started
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        result = measure(Path(folder), sizes, options.threads)
    if options.json is not None:
        write_measurement(result, pictures(result), options.json, options.plot)
    print(tables(result))
    print(f"server's CPU while others have their turn: {result['sampling']['server_cpu_while_others_run']:.1%} of a core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
