"""Machines full of GPUs that a run can be planned for."""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.errors import Refused
from megapsft.platform.chips import GPU, GPUS
from megapsft.platform.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Machines:
    """So many machines of so many GPUs, one rank on each GPU."""

    gpu: GPU
    nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                remedy = "use 1 or more"
                raise Refused(f"--{name.replace('_', '-')} {getattr(self, name)}", "must be 1 or more", remedy)

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def of_rank(self) -> Machine:
        """What a rank finds there, with software that is new enough for all that its GPU has."""
        return Machine(capability=self.gpu.capability, cuda=(13, 0), transformer_engine=(2, 19))


def gpu_named(name: str) -> GPU:
    """The GPU of the table.

    Raises:
        Refused: there is none of that name.
    """
    if name not in GPUS:
        raise Refused(f"--gpu {name}", "is not in the table", "use one of " + ", ".join(GPUS))
    return GPUS[name]
