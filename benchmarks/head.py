"""Memory and time of the head: log-probabilities of labels from hidden states, forward and backward, ours beside others.

    python benchmarks/head.py                                      # T=4096, V=151936, D=1024 in fp32: about 15 minutes, 14 GB
    python benchmarks/head.py --quick                              # small: seconds
    python benchmarks/head.py --tokens 8192 --hidden 2048 --out results/head

Compared, each call in a process of its own, the order changing every round:

    plain   hidden @ weight.T, log_softmax, gather: all logits, their log-softmax and their gradient at once
    ours    megapsft.policy.vocab_parallel, backend torch: slabs of the vocabulary; entropy comes along
    trl     TRL's ChunkedLogProbFunction (pip install trl==1.16.0): tiles of the vocabulary; entropy comes along

Time is of one forward and one backward pass after a small one to warm up. Memory is what the process's resident set grew by at
its peak, less the gradients of hidden states and weight, which any implementation must return. Ratios are between neighbours in
time, in one run. Writes JSON and a picture.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megapsft.report.figure import Bars, Chart, Line, Series
from megapsft.report.stored import write_measurement

CHUNK_BYTES = 64 * 2**20  # the default of model.logprob_chunk_bytes; TRL's tiles get as many bytes


@dataclass(frozen=True)
class Size:
    tokens: int
    vocab: int
    hidden: int

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.hidden * (self.tokens + self.vocab)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from megapsft.policy.vocab_parallel import vocab_parallel_logprobs

    return vocab_parallel_logprobs(hidden, weight, labels, None, len(weight), CHUNK_BYTES, entropy_gradient=False)[0]


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

    columns = CHUNK_BYTES // (4 * min(len(hidden), TOKEN_CHUNK_SIZE))
    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, columns, None, 1.0, ("entropy",))[0]


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "ours": ours, "trl": trl}


def available() -> list[str]:
    """The implementations that are installed."""
    return [name for name in IMPLEMENTATIONS if name != "trl" or importlib.util.find_spec("trl")]


def measure(name: str, size: Size, threads: int) -> dict[str, Any]:
    """Seconds and peak bytes of one forward and backward pass, in this process."""
    torch.set_num_threads(threads)
    run = IMPLEMENTATIONS[name]
    backward(run, *inputs(Size(min(size.tokens, 64), min(size.vocab, 512), size.hidden)))
    hidden, weight, labels = inputs(size)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    begin, cpu = time.perf_counter(), time.process_time()
    logprobs = backward(run, hidden, weight, labels)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    peak = resident("VmHWM") - before - size.gradient_bytes
    sample = slice(None, None, max(1, size.tokens // 16))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": max(0, peak),
        "logprobs": logprobs[sample].tolist(),
        "gradient_norms": [hidden.grad.norm().item(), weight.grad.norm().item()],
    }


def inputs(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(size.tokens, size.hidden, generator=generator).requires_grad_()
    weight = torch.randn(size.vocab, size.hidden, generator=generator).mul_(size.hidden**-0.5).requires_grad_()
    return hidden, weight, torch.randint(size.vocab, (size.tokens,), generator=generator)


def backward(run: Callable, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logprobs = run(hidden, weight, labels)
    (-logprobs.mean()).backward()
    return logprobs.detach()


def resident(field: str) -> int:
    """Bytes of `field` of this process's status, VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_a_process(name: str, size: Size, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", name, "--threads", str(threads)]
    command += ["--tokens", str(size.tokens), "--vocab", str(size.vocab), "--hidden", str(size.hidden)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed on {size}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(size: Size, rounds: int, growth: Sequence[int], threads: int) -> dict[str, Any]:
    """All implementations at `size`, `rounds` times, and once at each number of tokens in `growth`."""
    names = available()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(in_a_process(name, size, threads))
            one = found[name][-1]
            print(f"round {number + 1}: {name:6} {one['seconds']:7.2f} s {one['peak_bytes'] / 2**20:8.0f} MiB", flush=True)
    check(found)
    curve = {name: {str(size.tokens): median(one["peak_bytes"] for one in found[name])} for name in names}
    for tokens in growth:
        for name in names:
            curve[name][str(tokens)] = in_a_process(name, Size(tokens, size.vocab, size.hidden), threads)["peak_bytes"]
            print(f"T={tokens}: {name:6} {curve[name][str(tokens)] / 2**20:8.0f} MiB", flush=True)
    rows = {name: summary(found[name], found["plain"]) for name in names}
    return {
        "benchmark": "head",
        "date": datetime.now(UTC).date().isoformat(),
        "size": asdict(size),
        "chunk_bytes": CHUNK_BYTES,
        "threads": threads,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "not_installed": sorted(set(IMPLEMENTATIONS) - set(names)),
        "implementations": rows,
        "peak_bytes_by_tokens": {name: dict(sorted(curve[name].items(), key=lambda item: int(item[0]))) for name in names},
    }


def summary(own: list[dict[str, Any]], against: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and the ratios to plain of the same round."""
    ratios, cpu = ([a[key] / b[key] for a, b in zip(own, against, strict=True)] for key in ("seconds", "cpu_seconds"))
    memory = median(a["peak_bytes"] for a in own)
    return {
        "seconds": [one["seconds"] for one in own],
        "peak_bytes": [one["peak_bytes"] for one in own],
        "time_over_plain": median(ratios),
        "time_over_plain_range": [min(ratios), max(ratios)],
        "cpu_time_over_plain": median(cpu),
        "memory_over_plain": memory / median(b["peak_bytes"] for b in against),
    }


def check(found: dict[str, list[dict[str, Any]]]) -> None:
    """All must have computed the same."""
    expected = found["plain"][0]
    for name, runs in found.items():
        for key in ("logprobs", "gradient_norms"):
            ours, theirs = torch.tensor(runs[0][key]), torch.tensor(expected[key])
            if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
                raise RuntimeError(f"{name} disagrees with plain on {key}: {ours} against {theirs}")


def pictures(result: dict[str, Any]) -> list[Bars | Chart]:
    """Time beside memory, and memory over tokens."""
    names, size = list(result["implementations"]), result["size"]
    shape = f"log-probabilities, forward and backward: T={size['tokens']}, V={size['vocab']}, D={size['hidden']}, fp32, CPU"
    curves = [
        Line(name=name, x=list(map(int, curve)), y=[peak / 2**20 for peak in curve.values()], colour=colour, dots=True)
        for colour, (name, curve) in enumerate(result["peak_bytes_by_tokens"].items())
    ]

    def bars(key: str, title: str) -> Bars:
        values = [result["implementations"][name][key] for name in names]
        return Bars(name=key, title=title, x_label="implementation", y_label="times that of plain", names=names,
                    series=[Series(name=title, values=values)], note=shape)  # fmt: skip

    return [
        bars("time_over_plain", "time"),
        bars("memory_over_plain", "peak memory"),
        Chart(name="memory_over_tokens", title="peak memory over tokens", x_label="tokens", log_y=True,
              y_label="MiB beyond inputs, weight, gradients", lines=curves),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="1 is disturbed least by others on the machine")
    parser.add_argument("--quick", action="store_true", help="T=512, V=8192, D=128, one round")
    parser.add_argument("--out", type=Path, default=Path("docs/results/head"), help="PATH.json and PATH.png are written")
    parser.add_argument("--measure", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    size = Size(512, 8192, 128) if options.quick else Size(options.tokens, options.vocab, options.hidden)
    if options.measure:
        print(json.dumps(measure(options.measure, size, options.threads)))
        return 0
    result = compare(size, 1 if options.quick else options.rounds, (size.tokens // 4, size.tokens // 2), options.threads)
    write_measurement(result, pictures(result), options.out.with_suffix(".json"), options.out.with_suffix(".png"))
    for name, row in result["implementations"].items():
        print(f"{name:6} time x {row['time_over_plain']:.3f}, memory x {row['memory_over_plain']:.3f} of plain")
    print(f"wrote {options.out.with_suffix('.json')} and {options.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
