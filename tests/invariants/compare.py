"""A split against one rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megapsft.checkpoint.random_init import init_model
from megapsft.data.arithmetic import generate, write_jsonl
from tests.invariants.measure import measure
from tests.invariants.splits import REFERENCE, Split
from tests.ranks import run_ranks

GRADIENT_TOLERANCE, LOSS_TOLERANCE = 1e-5, 1e-6
SAMPLES = 16
FAMILIES = {"dense": "qwen3", "moe": "qwen3_moe"}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kind: str
    objective: str
    split: str
    loss_difference: float  # relative
    gradient_difference: float  # largest over tensors: |g - g1| / |g1|
    tensor: str  # where it is largest
    clip_fraction: float
    bitwise: bool  # import then export

    @property
    def passed(self) -> bool:
        return self.bitwise and self.gradient_difference <= GRADIENT_TOLERANCE and self.loss_difference <= LOSS_TOLERANCE


class Comparison:
    """Models, data and the gradients on one rank, made once in `folder`.

    Args:
        options: config overrides of all splits, such as those of LoRA, whose gradients are those of the adapters.
        samples: of an update.
    """

    def __init__(self, folder: Path, options: tuple[str, ...] = (), samples: int = SAMPLES):
        self.folder, self.options, self.samples, self._references, self._made = folder, options, samples, {}, {}
        self.data = folder / "data.jsonl"
        write_jsonl(self.data, generate(64, 7))

    def at_old_policy(self, kind: str, split: Split) -> dict[str, dict]:
        """Metrics and gradients by objective, where the trained policy is the old one."""
        old, _ = self._models(kind)
        return run_ranks(split.world, measure, old, old, self.data, self.options + split.options, self.samples)[0]

    def rows(self, kind: str, split: Split, samples: int | None = None) -> list[Row]:
        """Both objectives on `split`; with fewer `samples` than the reference has, they must differ."""
        ours, reference = self._measure(kind, split, samples or self.samples), self._reference(kind)
        rows = []
        for name, result in ours.items():
            expected = reference[name]
            losses = result["metrics"]["train/loss"], expected["metrics"]["train/loss"]
            assert result["gradient"].keys() == expected["gradient"].keys()
            distances = {
                tensor: float((result["gradient"][tensor] - g).double().norm() / g.double().norm())
                for tensor, g in expected["gradient"].items()
            }
            norms = result["metrics"]["train/grad_norm"], expected["metrics"]["train/grad_norm"]
            distances["(global norm)"] = abs(norms[0] - norms[1]) / norms[1]
            worst = max(distances, key=distances.get)
            clipped = result["metrics"]["objective/clip_fraction"]
            loss = abs(losses[0] - losses[1]) / abs(losses[1])
            rows.append(Row(kind, name, split.name, loss, distances[worst], worst, clipped, result["bitwise"]))
        return rows

    def _reference(self, kind: str) -> dict[str, dict]:
        if kind not in self._references:
            self._references[kind] = self._measure(kind, REFERENCE, self.samples)
        return self._references[kind]

    def _measure(self, kind: str, split: Split, samples: int) -> dict[str, dict]:
        old, new = self._models(kind)
        return run_ranks(split.world, measure, old, new, self.data, self.options + split.options, samples)[0]

    def _models(self, kind: str) -> tuple[Path, Path]:
        if kind not in self._made:
            self._made[kind] = perturbed(self.folder, kind, self.data, names=("old", "new"))
        return self._made[kind]["old"], self._made[kind]["new"]


def perturbed(folder: Path, kind: str, data: Path, names: Sequence[str]) -> dict[str, Path]:
    """A random model with weights large enough that attention and routing matter, and others some updates away from it."""
    made, weights, generator = {}, {}, torch.Generator().manual_seed(3)
    for name in names:
        made[name] = folder / f"{kind}-{name}"
        init_model(family=FAMILIES[kind], data_path=data, out_dir=made[name], vocab_size=307,
                   hidden_size=64, intermediate_size=128, seed=1)  # fmt: skip
        if not weights:
            weights = load_file(made[name] / "model.safetensors")
            moved = weights = {name: w if w.dim() == 1 else w * 4 for name, w in weights.items()}
        else:
            moved = {name: w + 0.01 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
        save_file(moved, made[name] / "model.safetensors", metadata={"format": "pt"})
    return made


def to_json(rows: list[Row]) -> str:
    return json.dumps([row.__dict__ | {"passed": row.passed} for row in rows], indent=1)
