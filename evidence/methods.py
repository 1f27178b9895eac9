"""The table of methods: what each trains, on what, from where, and with how many samples. Claims share its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evidence.sizes import Sizes

BASE = "base"
FIXED = "psft, fixed reference"
CLIPS = {"0.1": 0.1, "0.2": 0.2, "0.28": 0.28, "0.4": 0.4, "none": None}
REFRESHES = (1, 2, 4, 16)  # updates of an old policy, beside those of a step of the other runs: minibatches in `batch`
RESPONSES = 8  # to a prompt, as in configs/rl.yaml
RATES = (1e-4, 3e-4, 1e-3)  # learning rates that are tried
DPO_RATES = (3e-5, 1e-4, 3e-4)  # and of DPO


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of training. Where `rate_of` names another method, its learning rate is that one's; else it is tuned."""

    config: str
    rows: str = "demonstrations"
    set: tuple[str, ...]
    start: str | None = BASE
    rates: tuple[float, ...] = RATES
    rate_of: str | None = None
    rate_keys: tuple[str, ...] = ("optimizer.lr",)  # of the config, that the rate is
    samples: int  # demonstrations, responses and sides of pairs that are trained on, the same one twice counted twice


def table(sizes: Sizes) -> dict[str, Method]:
    """All methods by their names."""
    found = {BASE: _pretraining(sizes)}
    found |= _fine_tuning(sizes)
    found |= {psft_with_clip(name): _psft(sizes, f"objective.clip_high={'null' if clip is None else clip}")
              for name, clip in CLIPS.items() if name != "0.28"}  # fmt: skip
    found |= {psft_refreshed(updates, sizes): _psft(sizes, batch=updates * sizes.minibatch)
              for updates in REFRESHES if updates != updates_of_a_step(sizes)}  # fmt: skip
    found[FIXED] = _psft(sizes, "objective.old_policy=reference")
    found |= {psft_warmed_up(steps): _psft(sizes, warm_up=steps) for steps in warm_ups(sizes) if steps}
    found |= {f"{first} -> grpo": _rl(sizes, "grpo", sizes.rl_steps, RESPONSES, first) for first in ("sft", "psft")}
    found["srft"] = _rl(sizes, "srft", srft_steps(sizes), RESPONSES + 1, BASE)
    found |= {f"{first} -> dpo": _dpo(sizes, first) for first in ("sft", "psft")}
    return found


def psft_with_clip(name: str) -> str:
    return "psft" if name == "0.28" else f"psft, clip {name}"


def updates_of_a_step(sizes: Sizes) -> int:
    return sizes.batch // sizes.minibatch


def psft_refreshed(updates: int, sizes: Sizes) -> str:
    return "psft" if updates == updates_of_a_step(sizes) else f"psft, refreshed after {updates}"


def warm_ups(sizes: Sizes) -> tuple[int, ...]:
    """Steps of plain SFT before PSFT, of `sizes.steps` in all."""
    return 0, sizes.steps // 8, sizes.steps // 4, sizes.steps // 2


def psft_warmed_up(steps: int) -> str:
    return f"psft, warm-up {steps}" if steps else "psft"


def srft_steps(sizes: Sizes) -> int:
    """So that SRFT trains on as many samples as SFT and GRPO after it, or just fewer."""
    both = sizes.steps * sizes.batch + sizes.rl_steps * sizes.rl_prompts * RESPONSES
    return both // (sizes.rl_prompts * (RESPONSES + 1))


def _pretraining(sizes: Sizes) -> Method:
    steps = sizes.pretrain_steps
    settings = (f"train.steps={steps}", f"evaluate.interval={steps}")
    return Method(config="pretrain.yaml", rows="pretrain", set=settings, start=None, rates=(3e-3,), samples=64 * steps)


def _fine_tuning(sizes: Sizes) -> Mapping[str, Method]:
    objectives = {"sft": (), "sft_kl": ("objective.kl_coef=0.5",), "psft": ("objective.clip_high=0.28",)}
    objectives |= {"dft": (), "iw_sft": (), "gem": ()}
    return {
        name: Method(config="finetune.yaml", set=(f"objective.name={name}", *options, *_steps(sizes, sizes.batch)),
                     samples=sizes.steps * sizes.batch)
        for name, options in objectives.items()
    }  # fmt: skip


def _psft(sizes: Sizes, *options: str, batch: int | None = None, warm_up: int = 0) -> Method:
    settings = ("objective.name=psft", *options, *_steps(sizes, batch or sizes.batch, warm_up))
    keys = ("optimizer.lr", "train.sft_warmup_lr") if warm_up else ("optimizer.lr",)
    return Method(config="finetune.yaml", set=settings, rate_of="psft", rate_keys=keys, samples=sizes.steps * sizes.batch)


def _steps(sizes: Sizes, batch: int, warm_up: int = 0) -> tuple[str, ...]:
    """So that every run trains on as many samples, in updates of as many, and is measured at its start, middle and end."""
    steps = sizes.steps * sizes.batch // batch
    sizes_of_batches = (f"train.batch_size={batch}", f"train.minibatch_size={sizes.minibatch}")
    lengths = (f"train.steps={steps - warm_up}", f"train.sft_warmup_steps={warm_up}", f"evaluate.interval={max(1, steps // 2)}")
    return sizes_of_batches + lengths


def _rl(sizes: Sizes, objective: str, steps: int, of_a_prompt: int, start: str) -> Method:
    prompts = sizes.rl_prompts
    settings = (f"objective.name={objective}", f"train.batch_size={prompts}", f"train.minibatch_size={prompts // 2}",
                f"train.steps={steps}", f"evaluate.interval={max(1, steps // 2)}")  # fmt: skip
    return Method(config="rl.yaml", set=settings, start=start, samples=steps * prompts * of_a_prompt)


def _dpo(sizes: Sizes, start: str) -> Method:
    settings = (f"train.steps={sizes.dpo_steps}", f"evaluate.interval={sizes.dpo_steps}")
    return Method(config="dpo.yaml", rows="preferences", set=settings, start=start, rates=DPO_RATES, samples=sizes.dpo_steps * 64)
