"""Time, CPU and memory of our converters beside `cp` and the converters of others, on a model shaped like Qwen3-30B-A3B.

    python benchmarks/convert.py                                    # 8 GB, three rounds: ten minutes, 27 GB of disk
    python benchmarks/convert.py --gb 8 16 --scratch /mnt/fast      # the same peak at both sizes?
    python benchmarks/convert.py --bridge-python bridge/bin/python  # with Megatron-Bridge: benchmarks/peers/bridge_import.py

A Hugging Face folder is made with the layers of Qwen3-30B-A3B, as many as give the size, and random finite bf16 numbers. Where
not even one layer fits, everything is narrowed by a power of two, and the JSON says so. Then, in turns, the order changing
every round:

    cp            cp -r of the folder
    dd            its files four at a time with O_DIRECT: what the disk gives
    import        python tools/convert/hf_to_megatron.py --hf SOURCE --out ...
    export        python tools/convert/megatron_to_hf.py --megatron ... --out ..., of an import made before
    transformers  from_pretrained in bf16 and save_pretrained
    bridge        Megatron-Bridge 0.3.1 and Megatron-Core's save, with an interpreter that has them (benchmarks/peers)

Seconds on the wall are from the start of the command until a `sync` after it has returned. CPU seconds are those of the process
and its children, without the kernel's own writing. Peak RSS is the kernel's figure of the largest process (ru_maxrss), with the
pages of mapped files; it is never less than what this program takes itself (`floor_rss_bytes`), which counts while the child
starts. The JSON also has the largest sum over the process and its children that was seen every 20 ms (`tree_rss_bytes`; pages
that they share count for each). Before every turn files are synced and the source is dropped from the page cache; what a turn
wrote is removed after it. Ratios are to `cp` of the same round. A peer that would not fit into memory, or fails, is named with
the reason. At the end the last export is compared with the source, bit by bit, by code of this file. Writes JSON and a picture,
and prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from megapsft.report.figure import Bars, Series
from megapsft.report.stored import write_measurement

# Neither numpy nor torch here: the memory of this process is the least that can be measured of a child.

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).resolve().parent / "peers"
SHARD_BYTES = 4_000_000_000  # as in Qwen's own folder
CHUNK_BYTES = 16 * 2**20
PEER_MEMORY = {"transformers": 1.5, "bridge": 2.2}  # of the source's bytes, without the pages of mapped files
SAMPLE_SECONDS = 0.02
ALWAYS = ("cp", "dd", "import", "export")
ORDER = ("cp", "dd", "import", "export", "transformers", "bridge")


@dataclass(frozen=True)
class Shape:
    """Qwen3-30B-A3B, but for the number of layers."""

    layers: int = 1
    hidden: int = 2048
    experts: int = 128
    moe_intermediate: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 151_936
    narrowed_by: int = 1

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by Hugging Face name, in the order of the folder."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in self.layer.items()}
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    @property
    def layer(self) -> dict[str, tuple[int, ...]]:
        hidden, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.k_norm": (self.head_dim,),
            "post_attention_layernorm": (hidden,),
            "mlp.gate": (self.experts, hidden),
        }
        for expert in range(self.experts):
            found[f"mlp.experts.{expert}.gate_proj"] = (self.moe_intermediate, hidden)
            found[f"mlp.experts.{expert}.up_proj"] = (self.moe_intermediate, hidden)
            found[f"mlp.experts.{expert}.down_proj"] = (hidden, self.moe_intermediate)
        return found

    @property
    def nbytes(self) -> int:
        return sum(map(nbytes, self.tensors.values()))

    @property
    def config(self) -> dict[str, Any]:
        """config.json, as Qwen wrote it for transformers 4."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "decoder_sparse_step": 1,
            "eos_token_id": 0,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": 3 * self.hidden,
            "max_position_embeddings": 40960,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.moe_intermediate,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": min(8, self.experts),
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }


def nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def shape_of(gigabytes: float) -> Shape:
    """The fewest layers that give `gigabytes` (1e9 bytes) or more, narrowed only where one layer is more than that."""
    wanted, real = gigabytes * 1e9, Shape()
    for factor in (1, 2, 4, 8, 16):
        shape = Shape(
            hidden=real.hidden // factor,
            experts=real.experts // factor,
            moe_intermediate=real.moe_intermediate // factor,
            heads=real.heads // factor,
            kv_heads=max(1, real.kv_heads // factor),
            vocab=real.vocab // factor,
            narrowed_by=factor,
        )
        if shape.nbytes <= wanted:
            break
    one_layer = sum(map(nbytes, shape.layer.values()))
    return replace(shape, layers=1 + max(0, math.ceil((wanted - shape.nbytes) / one_layer)))


def make(shape: Shape, folder: Path, seed: int) -> None:
    """Write the folder, a chunk at a time. All numbers are finite: the highest bit of the exponent is 0, all others random."""
    import numpy as np

    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    most = min(SHARD_BYTES, shape.nbytes // 3)
    for name, size in shape.tensors.items():
        if shards[-1] and sum(map(nbytes, shards[-1].values())) + nbytes(size) > most:
            shards.append({})
        shards[-1][name] = size
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(safetensors_header(tensors))
            left = sum(map(nbytes, tensors.values()))
            while left:
                count = min(left, CHUNK_BYTES)
                bits = np.frombuffer(generator.bytes(count), dtype="<u2") & np.uint16(0xBFFF)
                file.write(bits.data)
                left -= count
    index = {
        "metadata": {"total_size": shape.nbytes},
        "weight_map": {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors},
    }
    vocabulary = {"<|endoftext|>": 0, "a": 1}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|endoftext|>"},
    }
    texts = {
        "model.safetensors.index.json": index,
        "config.json": shape.config,
        "generation_config.json": {"eos_token_id": 0},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"},
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def safetensors_header(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes(shape)]}
        offset += nbytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    size: int

    def chunks(self) -> Iterator[bytes]:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            left = self.size
            while left:
                yield (data := file.read(min(left, CHUNK_BYTES)))
                if not data:
                    raise RuntimeError(f"{self.file} ends {left} bytes too early")
                left -= len(data)


def places(folder: Path) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in found:
                raise RuntimeError(f"{name} is in {found[name].file} and in {path}")
            start, stop = entry["data_offsets"]
            found[name] = Place(path, 8 + length + start, entry["dtype"], tuple(entry["shape"]), stop - start)
    return found


def compare(source: Path, other: Path) -> dict[str, Any]:
    """Every tensor of both folders, bit by bit, a chunk at a time.

    Raises:
        RuntimeError: a name, a dtype, a shape or a bit differs.
    """
    ours, theirs = places(source), places(other)
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"names differ: {sorted(ours.keys() ^ theirs.keys())[:10]}")
    for name, one in ours.items():
        two = theirs[name]
        if (one.dtype, one.shape, one.size) != (two.dtype, two.shape, two.size):
            raise RuntimeError(f"{name} is {one.dtype} {one.shape} and {two.dtype} {two.shape}")
        if any(a != b for a, b in zip(one.chunks(), two.chunks(), strict=True)):
            raise RuntimeError(f"{name} differs in its numbers")
    return {"tensors": len(ours), "bytes": sum(place.size for place in ours.values()), "bitwise_equal": True}


class Tree(threading.Thread):
    """Watches what a process and its children hold in memory together, until told to stop."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak, self.stopped = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self._resident(self.pid))

    def _resident(self, pid: int) -> int:
        total = 0
        with contextlib.suppress(OSError, ValueError):  # it may end meanwhile
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            for task in os.listdir(f"/proc/{pid}/task"):
                for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                    total += self._resident(int(child))
        return total


def measure(command: Sequence[str]) -> dict[str, Any]:
    """One command from its start until all it wrote is on the disk.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    load = os.getloadavg()[0]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryFile() as said:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment)
        with contextlib.suppress(OSError):  # where memory runs out, this one is to end and nobody else's
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        tree = Tree(process.pid)
        tree.start()
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.perf_counter()
        process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it again
        tree.stopped.set()
        os.sync()
        seconds = time.perf_counter() - begin
        tree.join()
        if process.returncode:
            said.seek(0)
            text = said.read().decode(errors="replace").strip()[-3000:]
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{text}")
    return {
        "seconds": seconds,
        "sync_seconds": seconds - (ended - begin),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "max_rss_bytes": usage.ru_maxrss * 1024,
        "tree_rss_bytes": tree.peak,
        "load_average_before": load,
    }


def drop_from_cache(folder: Path) -> None:
    """Every file of the folder, once it is written; and all else, where we may."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def commands(source: Path, megatron: Path, out: Path, bridge_python: str | None) -> dict[str, list[str]]:
    one = 'dd if="$0" of="$1/${0##*/}" bs=16M iflag=direct oflag=direct status=none'
    each = f'mkdir "$1" && find "$0" -type f -print0 | xargs -0 -P4 -I{{}} sh -c \'{one}\' {{}} "$1"'
    return {
        "cp": ["cp", "-r", str(source), str(out)],
        "dd": ["sh", "-c", each, str(source), str(out)],
        "import": [sys.executable, "tools/convert/hf_to_megatron.py", "--hf", str(source), "--out", str(out)],
        "export": [sys.executable, "tools/convert/megatron_to_hf.py", "--megatron", str(megatron), "--out", str(out)],
        "transformers": [sys.executable, str(PEERS / "transformers_copy.py"), str(source), str(out)],
        "bridge": [bridge_python or "", str(PEERS / "bridge_import.py"), str(source), str(out)],
    }


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def left_out(peers: Sequence[str], source_bytes: int, bridge_python: str | None) -> dict[str, str]:
    """Why a peer cannot take part."""
    why = {name: "not asked for" for name in PEER_MEMORY if name not in peers}
    if "bridge" in peers and bridge_python is None:
        why["bridge"] = "no interpreter was given with --bridge-python"
    there = available_memory()
    for name in peers:
        needed = PEER_MEMORY[name] * source_bytes
        if needed > there:
            why.setdefault(name, f"needs about {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} are free")
    return why


def run_size(gigabytes: float, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything at one size; nothing of it stays in `scratch`."""
    shape = shape_of(gigabytes)
    free, needed = shutil.disk_usage(scratch).free, 3.1 * shape.nbytes  # the source, an import of it, what a turn writes
    if free < needed:
        raise SystemExit(f"{scratch} has {free / 1e9:.1f} GB free; {gigabytes:g} GB of source need {needed / 1e9:.1f}")
    source, megatron, out, exported = (scratch / name for name in ("hf", "megatron", "out", "exported"))
    in_a_process("--make", str(source), "--gb", str(gigabytes), "--seed", str(options.seed))
    orders = commands(source, megatron, out, options.bridge_python)
    measure([*orders["import"][:-1], str(megatron)])  # what the export reads
    why = left_out(options.peers, shape.nbytes, options.bridge_python)
    turns: list[dict[str, Any]] = []
    for number in range(options.rounds):
        names = [name for name in (*ALWAYS, *PEER_MEMORY) if name not in why]
        if number >= options.peer_rounds:
            names = [name for name in names if name not in PEER_MEMORY]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            drop_from_cache(scratch)
            try:
                turn = measure(orders[name])
            except RuntimeError as error:
                if name in ("cp", "import", "export"):
                    raise
                why[name] = str(error)
            else:
                turns.append({"round": number, "what": name, **turn, "written_bytes": size_of(out)})
                print(line(turns[-1]), flush=True)
                if turns[-1]["written_bytes"] < shape.nbytes:
                    raise RuntimeError(f"{name} wrote {turns[-1]['written_bytes']} bytes of {shape.nbytes}")
            if name == "export" and number == options.rounds - 1:
                out.rename(exported)
                round_trip = in_a_process("--compare", str(source), str(exported))
                shutil.rmtree(exported)
            shutil.rmtree(out, ignore_errors=True)
    source_is = {
        "bytes": shape.nbytes,
        "tensors": len(shape.tensors),
        "shards": len(list(source.glob("*.safetensors"))),
        "narrowed": shape.narrowed_by > 1,
        **asdict(shape),
    }
    for folder in (source, megatron):
        shutil.rmtree(folder)
    return {
        "gb_asked": gigabytes,
        "source": source_is,
        "round_trip": round_trip,
        "left_out": why,
        "summary": summary(turns),
        "turns": turns,
    }


def line(turn: dict[str, Any]) -> str:
    return (
        f"round {turn['round'] + 1}: {turn['what']:12} {turn['seconds']:8.2f} s {turn['cpu_seconds']:8.2f} CPU-s "
        f"{turn['max_rss_bytes'] / 1e9:6.2f} GB peak, load {turn['load_average_before']:.1f}"
    )


def in_a_process(*arguments: str) -> Any:
    """Another task of this file, so that its memory is not ours; what its last line says."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def summary(turns: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By what was run: medians, and ratios to `cp` of the same round."""
    cp = {turn["round"]: turn for turn in turns if turn["what"] == "cp"}
    found = {}
    for name in ORDER:
        own = [turn for turn in turns if turn["what"] == name]
        if not own:
            continue
        ratios = [turn["seconds"] / cp[turn["round"]]["seconds"] for turn in own]
        found[name] = {
            "turns": len(own),
            **{key: median(turn[key] for turn in own) for key in ("seconds", "cpu_seconds", "tree_rss_bytes")},
            "max_rss_bytes": max(turn["max_rss_bytes"] for turn in own),
            "wall_over_cp": median(ratios),
            "wall_over_cp_range": [min(ratios), max(ratios)],
            "cpu_over_cp": median(turn["cpu_seconds"] / cp[turn["round"]]["cpu_seconds"] for turn in own),
        }
    return found


def machine(scratch: Path) -> dict[str, Any]:
    versions = {}
    for name in ("torch", "transformers", "safetensors", "numpy", "megatron-core"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "memory_bytes": 1024 * int(lines[0].split()[1]),
        "kernel": platform.release(),
        "filesystem": filesystem(scratch),
        "load_average_at_start": list(os.getloadavg()),
        "python": platform.python_version(),
        **versions,
    }


def filesystem(folder: Path) -> str:
    """Its type, as the kernel names it."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for entry in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = entry.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"


def pictures(result: dict[str, Any]) -> list[Bars]:
    """Time over that of `cp`, and peak memory, by size; a gap where one was left out."""
    sizes, here = result["sizes"], result["machine"]
    names = [name for name in ORDER if any(name in size["summary"] for size in sizes)]

    def bars(name: str, key: str, unit: float, title: str, y_label: str) -> Bars:
        series = [
            Series(
                name=f"{size['source']['bytes'] / 1e9:.3g} GB", colour=colour,
                values=[size["summary"][what][key] / unit if what in size["summary"] else math.nan for what in names],
            )
            for colour, size in enumerate(sizes)
        ]  # fmt: skip
        note = f"A model of the shape of Qwen3-30B-A3B; {here['cpus']} cores, {here['filesystem']}, cold page cache."
        return Bars(name=name, title=title, x_label="converter", y_label=y_label, names=names, series=series, note=note)

    return [
        bars("time", "wall_over_cp", 1, "time of a conversion", "times that of cp"),
        bars("memory", "max_rss_bytes", 1e9, "peak memory", "GB, resident"),
    ]


def table(result: dict[str, Any]) -> str:
    """In Markdown."""
    headings = ("size", "", "wall, s", "/ cp", "lowest to highest", "CPU, s", "peak RSS, GB", "turns")
    rows = [headings, ("---:", "---", *["---:"] * 6)]
    for size in result["sizes"]:
        for name, row in size["summary"].items():
            low, high = row["wall_over_cp_range"]
            rows.append(
                (
                    f"{size['source']['bytes'] / 1e9:.3g} GB",
                    name,
                    f"{row['seconds']:.1f}",
                    f"{row['wall_over_cp']:.2f}",
                    f"{low:.2f}-{high:.2f}",
                    f"{row['cpu_seconds']:.1f}",
                    f"{row['max_rss_bytes'] / 1e9:.2f}",
                    str(row["turns"]),
                )
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", "--sizes", type=float, nargs="+", default=[8.0], help="of the source, one size or several")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=PEER_MEMORY, default=list(PEER_MEMORY))
    parser.add_argument("--peer-rounds", type=int, default=1, help="the first so many rounds have the peers in them")
    parser.add_argument("--bridge-python", help="an interpreter that has Megatron-Bridge 0.3.1")
    parser.add_argument("--scratch", type=Path, help="where to work, 3.1 times the size; else the system's temporary folder")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", type=Path, default=Path("docs/results/convert"), help="PATH.json and PATH.png are written")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compare", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.make:
        make(shape_of(options.gb[0]), options.make, options.seed)
        print("{}")
        return 0
    if options.compare:
        print(json.dumps(compare(*options.compare)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        here = machine(Path(folder))
        floor = measure([sys.executable, "-c", ""])["max_rss_bytes"]
        sizes = [run_size(gigabytes, options, Path(folder)) for gigabytes in options.gb]
    result = {
        "benchmark": "convert",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": here,
        "settings": {"rounds": options.rounds, "peer_rounds": options.peer_rounds, "seed": options.seed},
        "floor_rss_bytes": floor,
        "sizes": sizes,
    }
    write_measurement(result, pictures(result), options.out.with_suffix(".json"), options.out.with_suffix(".png"))
    print(table(result))
    for size in sizes:
        for name, reason in size["left_out"].items():
            print(f"without {name} at {size['gb_asked']:g} GB: {reason.splitlines()[-1]}")
    print(f"wrote {options.out.with_suffix('.json')} and {options.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
