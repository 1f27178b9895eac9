"""The engine that a run samples with, and how its weights follow those of the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapsft.checkpoint.hf import export_stream
from megapsft.checkpoint.hf_save import copy_companions, write_config
from megapsft.checkpoint.together import from_first, refuse_together
from megapsft.checkpoint.weights.fp8 import linear_weights, quantised_stream, quantization_config
from megapsft.config import Config, RolloutConfig
from megapsft.errors import Refused, TrainingStopped
from megapsft.policy.build import Policy
from megapsft.policy.gather import gather_stale
from megapsft.policy.generate import InProcess
from megapsft.rollout.base import Engine
from megapsft.train.plan import RunPlan, run_folder

RETURN_ROUTING = "--enable-return-routed-experts"
NO_WEIGHTS = ("--load-format", "dummy")


@dataclass
class Live:
    """An engine whose weights are the policy's."""

    engine: Engine | None  # None on ranks that do not speak to it
    everywhere: bool  # whether all ranks call it together; where not, rank 0 does
    policy: Policy
    fp8: bool = False  # it gets linear layers in FP8, in blocks; SGLang only
    version: int | None = None  # steps behind the weights that it has

    def update(self, version: int) -> None:
        """Collective. Give the engine the weights that the policy has after `version` steps, unless it has them."""
        if self.version == version:
            return
        gather_stale(self.policy.chunks)
        stream = export_stream(self.policy.chunks, self.policy.hf)
        if self.everywhere:
            self.engine.load_weights(stream, version)
        else:
            from_first(lambda: self._load(stream, version), otherwise=lambda: exhaust(stream))
        self.version = version

    def _load(self, stream: Iterator[tuple[str, Tensor | None]], version: int) -> None:
        try:
            if self.fp8:
                self.engine.load_weights(quantised_stream(stream, linear_weights(self.policy.hf)), version, fp8=True)
            else:
                self.engine.load_weights(stream, version)
        except RuntimeError as error:
            raise TrainingStopped(f"the weights of step {version} could not be handed over: {error}") from error
        finally:
            exhaust(stream)  # or the other ranks would wait for this one

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


def open_engine(plan: RunPlan, policy: Policy) -> Live:
    """Collective. The engine of `rollout.engine`; SGLang's servers are started by rank 0.

    Raises:
        Refused: no SGLang, or a server that does not start, or does not return the routing that is to be replayed.
    """
    config, options = plan.config, plan.config.rollout
    if options.engine == "inprocess":
        return Live(InProcess(policy, max_batch_size=options.max_batch_size), True, policy)
    opened: list[Engine] = []

    def open_first() -> None:
        from megapsft.rollout.sglang.engine import SGLang  # its client is of no use to others

        work = run_folder(config) / "rollout"
        model = fp8_folder(policy, work / "fp8-model") if options.fp8 else policy.source
        engine = SGLang(server_options(config), model, work=work, dtype=config.model.dtype)
        silent = [server.url for server in engine.servers if not server.routed_experts]
        if silent and config.model.moe_routing_replay == "rollout":
            engine.close()
            rule = f"replays the experts that servers return, and {', '.join(silent)} does not"
            raise Refused("model.moe_routing_replay=rollout", rule, f"start it with {RETURN_ROUTING}")
        opened.append(engine)

    refuse_together(open_first)
    return Live(opened[0] if opened else None, False, policy, options.fp8)


def server_options(config: Config) -> RolloutConfig:
    """`config.rollout`, its servers started with what other options ask of them. Those of `rollout.urls` run already."""
    options = config.rollout
    if options.urls:
        return options
    more = NO_WEIGHTS if options.fp8 else ()  # the policy's come before the first request
    if config.model.moe_routing_replay == "rollout" and RETURN_ROUTING not in options.server_args:
        more += (RETURN_ROUTING,)
    return dataclasses.replace(options, server_args=(*options.server_args, *more))


def fp8_folder(policy: Policy, folder: Path) -> Path:
    """A Hugging Face folder without weights, whose config.json says that they are in FP8 as `quantised_stream` gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(policy.hf, torch.bfloat16, folder, quantization_config(policy.hf))
    copy_companions(policy.source, folder)
    return folder


def exhaust(stream: Iterator[Any]) -> None:
    """This rank's part of a collective stream that another rank reads."""
    for _ in stream:
        pass


__all__ = ["RETURN_ROUTING", "Live", "fp8_folder", "open_engine", "server_options"]
