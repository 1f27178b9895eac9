"""The engine that a run samples with, and how its weights follow those of the policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megapsft.checkpoint.hf import export_stream
from megapsft.checkpoint.together import from_first, refuse_together
from megapsft.errors import TrainingStopped
from megapsft.policy.build import Policy
from megapsft.policy.generate import InProcess
from megapsft.rollout.base import Engine
from megapsft.train.plan import RunPlan, run_folder


@dataclass
class Live:
    """An engine whose weights are the policy's."""

    engine: Engine | None  # None on ranks that do not speak to it
    everywhere: bool  # whether all ranks call it together; where not, rank 0 does
    policy: Policy
    version: int | None = None  # steps behind the weights that it has

    def update(self, version: int) -> None:
        """Collective. Give the engine the weights that the policy has after `version` steps, unless it has them."""
        if self.version == version:
            return
        for chunk in self.policy.chunks:  # with overlapped gathering, parameters are stale until asked for
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        stream = export_stream(self.policy.chunks, self.policy.hf)
        if self.everywhere:
            self.engine.load_weights(stream, version)
        else:
            from_first(lambda: self._load(stream, version), otherwise=lambda: exhaust(stream))
        self.version = version

    def _load(self, stream: Iterator[tuple[str, Tensor | None]], version: int) -> None:
        try:
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
        Refused: no SGLang, or a server that does not start.
    """
    options = plan.config.rollout
    if options.engine == "inprocess":
        return Live(InProcess(policy, max_batch_size=options.max_batch_size), True, policy)
    opened: list[Engine] = []

    def open_first() -> None:
        from megapsft.rollout.sglang.engine import SGLang  # its client is of no use to others

        opened.append(SGLang(options, policy.source, work=run_folder(plan.config) / "rollout", dtype=plan.config.model.dtype))

    refuse_together(open_first)
    return Live(opened[0] if opened else None, False, policy)


def exhaust(stream: Iterator[Any]) -> None:
    """This rank's part of a collective stream that another rank reads."""
    for _ in stream:
        pass


__all__ = ["Live", "open_engine"]
