"""Tokens per second of one update, ours and that of Hugging Face's Trainer, and what a step of PSFT costs over one of SFT.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --rounds 20 --minibatch-size 8 --json train_step.json
    python benchmarks/train_step.py --model models/tiny --data train.jsonl

One process on the CPU, fp32. Both sides start from the same Hugging Face folder, see the same rows in the same order, and take
the same AdamW steps with the gradient clipped to a norm of 1; the losses must agree before anything is timed. They work in
turns, update by update: other work on the machine then slows both, and only ratios of neighbours are claimed. CPU time
of the process is reported next to time on the wall. Threads that wait for each other sleep (OMP_WAIT_POLICY=PASSIVE) unless you
say otherwise: where they spin, a thread that other work pushed aside makes the rest burn its share, on both sides.

- Ours is the loop of `megapsft train` without checkpoints, all of it: packing, forward, backward, optimizer, metrics, records.
- The peer is `transformers.Trainer` as its users have it: SDPA attention, rows padded to the longest of the batch, labels of -100
  on the prompt, the Trainer's default (fused) AdamW, no logging. Its clock runs from `on_step_begin` to `on_step_end`: fetching
  and collating rows is not counted for it, while ours is charged for packing them.
- PSFT and SFT take whole steps of 8 updates on the same rows, in turns; PSFT's includes the pass of the old policy.

Tokens are those of the rows, prompt and demonstration, without padding.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the figures are of the CPU
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import numpy as np
import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

from megapsft import parallel
from megapsft.checkpoint.random_init import init_model
from megapsft.config import load_config
from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.objectives.registry import build_objective
from megapsft.platform.launch import become_world_of_one
from megapsft.train.phases import Phase
from megapsft.train.plan import RunPlan, plan_run
from megapsft.train.prepare import with_constants
from megapsft.train.run import Run
from megapsft.train.start import start
from megapsft.train.update import Report, update
from megapsft.types import Sample

UPDATES_A_STEP = 8  # as in the paper
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.999), 1e-8, 0.1, 1.0
SAME_LOSS = 1e-4  # relative, of the first update


@dataclass(frozen=True)
class Settings:
    """Time an update of ours and of Hugging Face's Trainer in turns, and a step of PSFT and of SFT."""

    json: Path | None = None  # also write everything measured to this file
    rounds: int = 12  # of `updates` updates a side; a ratio is taken in each
    updates: int = 4  # a side, in one round
    psft_rounds: int = 6  # of one step of PSFT and one of SFT
    warmup: int = 3  # updates a side that are not timed
    threads: int = os.cpu_count() or 1  # of both sides
    minibatch_size: int = 16  # rows of an update
    hidden_size: int = 192  # of the random Qwen3, with 4 heads
    num_layers: int = 4
    vocab_size: int = 1024  # at most; the tokenizer is trained on the rows
    pack_length: int = 4096  # positions of our microbatches
    peer_optim: str = "adamw_torch_fused"  # the Trainer's own default; adamw_torch is the plain one
    model: Path | None = None  # a Hugging Face folder instead of a random Qwen3
    data: Path | None = None  # .jsonl with `question` and `answer` instead of generated arithmetic
    seed: int = 1234


def now() -> np.ndarray:
    """[2]: seconds on the wall, and of CPU time of this process."""
    return np.array([time.perf_counter(), time.process_time()])


class Rows(torch.utils.data.Dataset):
    """The samples as the Trainer's users write them: ids, and labels that are -100 on the prompt."""

    def __init__(self, samples: list[Sample]):
        self.rows = [
            {
                "input_ids": torch.from_numpy(sample.token_ids).long(),
                "labels": torch.from_numpy(sample.token_ids).long().masked_fill(~torch.from_numpy(sample.loss_mask), -100),
            }
            for sample in samples
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


@dataclass(frozen=True)
class PadToLongest:
    pad_token_id: int

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        def pad(values: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)

        return {
            "input_ids": pad([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": pad([row["labels"] for row in rows], -100),
            "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], 0),
        }


class PeerTrainer(transformers.Trainer):
    """The Trainer, with the loss of each update kept."""

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*args, **options)
        self.losses.append(loss)
        return loss


class Turns(transformers.TrainerCallback):
    """Clocks the Trainer's updates; after each, `other` has its turn on the same rows while the Trainer waits."""

    def __init__(self, other: Callable[[int], None]):
        self.other, self.seconds, self.begin = other, [], now()

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        self.begin = now()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        self.seconds.append(now() - self.begin)
        self.other(len(self.seconds) - 1)


def build_peer(settings: Settings, model: Path, samples: list[Sample], pad_token_id: int, updates: int, out: Path) -> PeerTrainer:
    """The Trainer over `samples` in their order. Before there is a process group, or it would wrap its model for one."""
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        per_device_train_batch_size=settings.minibatch_size,
        train_sampling_strategy="sequential",
        max_steps=updates,
        optim=settings.peer_optim,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=settings.seed,
    )
    trainer = PeerTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa"),
        args=arguments,
        train_dataset=Rows(samples),
        data_collator=PadToLongest(pad_token_id),
    )
    trainer.losses = []
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def our_plan(settings: Settings, model: Path, data: Path, folder: Path) -> RunPlan:
    """An ordinary run of 8 updates a step; only what it shows is off."""
    overrides = [
        f"run.dir={folder / 'run'}",
        f"model.path={model}",
        "model.dtype=float32",
        f"data.path={data}",
        "data.columns.prompt=question",
        "data.columns.demonstration=answer",
        f"data.pack_length={settings.pack_length}",
        f"train.batch_size={UPDATES_A_STEP * settings.minibatch_size}",
        f"train.minibatch_size={settings.minibatch_size}",
        f"train.seed={settings.seed}",
        f"optimizer.lr={LEARNING_RATE}",
        f"optimizer.weight_decay={WEIGHT_DECAY}",
        f"optimizer.adam_beta1={BETAS[0]}",
        f"optimizer.adam_beta2={BETAS[1]}",
        f"optimizer.adam_eps={EPS}",
        f"optimizer.clip_grad={CLIP}",
        "log.tensorboard=false",
        "log.progress=false",
    ]
    return plan_run(load_config(None, overrides), 1)


def phase(run: Run, name: str) -> Phase:
    """The run's phase with another objective."""
    return dataclasses.replace(run.plan.phases[-1], objective_name=name, objective=build_objective({"name": name}))


def our_updates(run: Run, samples: list[Sample], phase: Phase, step: int) -> list[Report]:
    """What `megapsft.train.loop` does with a step, short of its record and of the checkpoint."""
    batch = run.pack([(sample,) for sample in samples], phase.objective)
    batch = with_constants(run.policy, None, batch, phase.objective)
    reports = []
    for minibatch in batch.minibatches:
        reports.append(update(run.policy, phase.objective, run.optimizer, minibatch, run.learning_rate(step, phase)))
        run.log_update(step, phase, reports[-1])
    return reports


def against_trainer(settings: Settings, run: Run, trainer: PeerTrainer, samples: list[Sample]) -> dict[str, Any]:
    """Both sides through the same rows, update by update.

    Raises:
        SystemExit: the losses of the first update differ.
    """
    size, sft = settings.minibatch_size, phase(run, "sft")
    seconds: list[np.ndarray] = []
    losses: list[float] = []

    def rows(index: int) -> list[Sample]:
        return samples[index * size : (index + 1) * size]

    def ours(index: int) -> None:
        begin = now()
        (report,) = our_updates(run, rows(index), sft, 0)
        run.log_step(0, sft)
        seconds.append(now() - begin)
        losses.append(report.metrics["train/loss"])
        if index == 0:
            check_same_loss(losses[0], trainer.losses[0].item())

    turns = Turns(ours)
    trainer.add_callback(turns)
    trainer.train()
    trainer.remove_callback(turns)

    theirs = [loss.item() for loss in trainer.losses]
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, theirs, strict=True)]
    timed = range(settings.warmup, len(seconds))
    tokens = np.array([sum(map(len, rows(index))) for index in timed])
    padded = np.array([size * max(map(len, rows(index))) for index in timed])
    times = {"ours": np.array(seconds)[timed], "trainer": np.array(turns.seconds)[timed]}  # [updates, 2]
    by_round = {side: of.reshape(settings.rounds, settings.updates, 2).sum(axis=1) for side, of in times.items()}
    tokens_by_round = tokens.reshape(settings.rounds, settings.updates).sum(axis=1)
    return {
        "loss_of_first_update": {"ours": losses[0], "trainer": theirs[0], "relative_difference": differences[0]},
        "relative_differences_of_losses": differences,
        "tokens": tokens.tolist(),
        "padding_of_trainer": float(1 - tokens.sum() / padded.sum()),
        "seconds": {side: of[:, 0].tolist() for side, of in times.items()},
        "cpu_seconds": {side: of[:, 1].tolist() for side, of in times.items()},
        "tokens_per_second": {side: (tokens_by_round / of[:, 0]).tolist() for side, of in by_round.items()},
        "ratio": (by_round["trainer"][:, 0] / by_round["ours"][:, 0]).tolist(),
        "cpu_ratio": (by_round["trainer"][:, 1] / by_round["ours"][:, 1]).tolist(),
    }


def check_same_loss(ours: float, trainer: float) -> None:
    difference = abs(ours - trainer) / abs(trainer)
    print(f"loss of the first update: ours {ours:.7f}, Trainer {trainer:.7f}, relative difference {difference:.1e}")
    if not difference <= SAME_LOSS:
        raise SystemExit(f"the two sides do not compute the same: losses differ by more than {SAME_LOSS}; nothing was timed")


def psft_against_sft(settings: Settings, run: Run) -> dict[str, Any]:
    """Whole steps of both objectives on the same rows; who goes first changes every round."""
    names = ("sft", "psft")
    seconds: dict[str, list[np.ndarray]] = {name: [] for name in names}
    parts: dict[str, dict[str, float]] = {name: defaultdict(float) for name in names}
    phases = {name: phase(run, name) for name in names}
    tokens, old_policy = [], []
    for step in range(settings.psft_rounds):
        samples = [sample for group in run.source.next_groups(step) for sample in group]
        tokens.append(sum(map(len, samples)))
        for name in names if step % 2 == 0 else reversed(names):
            run.parts.take()
            begin = now()
            our_updates(run, samples, phases[name], step)
            taken = run.parts.take()
            run.log_step(step, phases[name])
            seconds[name].append(now() - begin)
            for part, spent in taken.items():
                parts[name][part] += spent
            if name == "psft":
                old_policy.append(float(taken["old_policy"] / seconds[name][-1][0]))
    times = {name: np.array(seconds[name]) for name in names}  # [rounds, 2]
    return {
        "tokens": tokens,
        "seconds": {name: times[name][:, 0].tolist() for name in names},
        "cpu_seconds": {name: times[name][:, 1].tolist() for name in names},
        "tokens_per_second": {name: (np.array(tokens) / times[name][:, 0]).tolist() for name in names},
        "ratio": (times["psft"] / times["sft"])[:, 0].tolist(),
        "cpu_ratio": (times["psft"] / times["sft"])[:, 1].tolist(),
        "old_policy_share": old_policy,
        "shares": {name: shares(parts[name], times[name][:, 0].sum()) for name in names},
    }


def shares(parts: dict[str, float], total: float) -> dict[str, float]:
    """Parts of the whole, as `megapsft.metrics.names.PARTS` calls them; the rest is records and what no part is."""
    found = {name: float(seconds / total) for name, seconds in parts.items()}
    return found | {"rest": 1 - sum(found.values())}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def machine(threads: int) -> dict[str, Any]:
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "megatron-core")}
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "threads": threads,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "load_average_at_start": list(load),
        "python": platform.python_version(),
        **versions,
    }


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Everything, in one process and one run; `folder` takes what must be written."""
    updates = settings.warmup + settings.rounds * settings.updates
    data = settings.data or folder / "train.jsonl"
    if settings.data is None:
        write_jsonl(data, generate(updates * settings.minibatch_size, settings.seed))
    model = settings.model or init_model(
        "qwen3",
        data,
        folder / "model",
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        head_dim=settings.hidden_size // 4,
        intermediate_size=settings.hidden_size * 8 // 3 // 8 * 8,
        seed=settings.seed,
    )
    plan = our_plan(settings, model, data, folder)
    steps = -(-updates // UPDATES_A_STEP)
    samples = [sample for step in range(steps) for group in plan.rows.next_groups(step) for sample in group]
    samples = samples[: updates * settings.minibatch_size]
    trainer = build_peer(settings, model, samples, plan.template.pad_token_id, updates, folder / "trainer")
    parameters = sum(p.numel() for p in trainer.model.parameters())

    become_world_of_one()
    parallel.initialize(plan.mesh, plan.config.parallel, plan.config.train.seed)
    torch.set_num_threads(settings.threads)
    try:
        run = start(plan)
        run.enter(0)
        here = machine(torch.get_num_threads())
        peer = against_trainer(settings, run, trainer, samples)
        objectives = psft_against_sft(settings, run)
        run.close()
    finally:
        parallel.shutdown()
    plain = dataclasses.asdict(settings)
    return {
        "benchmark": "train_step",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": here,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in plain.items() if k != "json"},
        "parameters": parameters,
        "ratios": {
            "ours_over_trainer": spread(peer["ratio"]),
            "ours_over_trainer_cpu_time": spread(peer["cpu_ratio"]),
            "psft_over_sft": spread(objectives["ratio"]),
            "psft_over_sft_cpu_time": spread(objectives["cpu_ratio"]),
            "old_policy_share_of_psft": spread(objectives["old_policy_share"]),
        },
        "against_trainer": peer,
        "psft_against_sft": objectives,
    }


def table(result: dict[str, Any]) -> Table:
    """What is claimed, and what it is made of."""
    peer, objectives, ratios = result["against_trainer"], result["psft_against_sft"], result["ratios"]
    made = Table(title=f"{result['parameters'] / 1e6:.1f}M parameters, {result['machine']['threads']} threads, fp32")
    made.add_column("")
    for heading in ("median", "min", "max"):
        made.add_column(heading, justify="right")

    def add(name: str, values: dict[str, float], form: str) -> None:
        made.add_row(name, *(format(values[key], form) for key in ("median", "min", "max")))

    add("ours, tokens/s", spread(peer["tokens_per_second"]["ours"]), ",.0f")
    add("Trainer, tokens/s", spread(peer["tokens_per_second"]["trainer"]), ",.0f")
    add("ours / Trainer (aim: 1.0 or more)", ratios["ours_over_trainer"], ".3f")
    add("ours / Trainer, by CPU time", ratios["ours_over_trainer_cpu_time"], ".3f")
    made.add_section()
    add("SFT step, tokens/s", spread(objectives["tokens_per_second"]["sft"]), ",.0f")
    add("PSFT step, tokens/s", spread(objectives["tokens_per_second"]["psft"]), ",.0f")
    add("time of PSFT / SFT (aim: 1.333 or less)", ratios["psft_over_sft"], ".3f")
    add("CPU time of PSFT / SFT", ratios["psft_over_sft_cpu_time"], ".3f")
    made.add_section()
    later = peer["relative_differences_of_losses"]
    made.add_row(
        f"losses apart by, {len(later)} updates",
        f"{median(later):.0e}",
        f"{min(later):.0e}",
        f"{max(later):.0e}",
    )
    add("share of a PSFT step: old policy", ratios["old_policy_share_of_psft"], ".1%")
    for part, share in objectives["shares"]["psft"].items():
        if part != "old_policy":
            made.add_row(f"share of a PSFT step: {part}", f"{share:.1%}", "", "")
    return made


def main() -> int:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(settings, Path(folder))
    if settings.json is not None:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(json.dumps(result, indent=2) + "\n")
    Console().print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
