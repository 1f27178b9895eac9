"""The GPUs that a run can be planned for, as their vendor describes them, and machines full of them."""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.errors import Refused

GB, TB, TFLOPS = 1e9, 1e12, 1e12
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class GPU:
    """Dense peaks, without sparsity; bandwidths in one direction."""

    memory: float  # bytes, as the driver reports them, or the least that is sold
    bf16: float  # FLOP a second
    fp8: float | None  # FLOP a second; None: it has none
    hbm: float  # bytes a second
    nvlink: float  # bytes a second from one GPU to the others of its machine
    network: float  # bytes a second of the network card that a GPU has to itself
    host: float  # bytes a second to the memory of the host
    source: str


GPUS = {
    "a100": GPU(
        memory=79 * GIB, bf16=312 * TFLOPS, fp8=None, hbm=2.039 * TB, nvlink=300 * GB, network=25 * GB, host=25 * GB,
        source="NVIDIA A100 datasheet, SXM 80 GB; DGX A100 datasheet: 8 x 200 Gb/s",
    ),
    "h100": GPU(
        memory=79 * GIB, bf16=989 * TFLOPS, fp8=1979 * TFLOPS, hbm=3.35 * TB, nvlink=450 * GB, network=50 * GB, host=50 * GB,
        source="NVIDIA H100 datasheet, SXM; DGX H100 datasheet: 8 x 400 Gb/s",
    ),
    "h200": GPU(
        memory=139 * GIB, bf16=989 * TFLOPS, fp8=1979 * TFLOPS, hbm=4.8 * TB, nvlink=450 * GB, network=50 * GB, host=50 * GB,
        source="NVIDIA H200 datasheet, SXM; DGX H200 datasheet: 8 x 400 Gb/s",
    ),
    "b200": GPU(
        memory=167 * GIB, bf16=2250 * TFLOPS, fp8=4500 * TFLOPS, hbm=8 * TB, nvlink=900 * GB, network=50 * GB, host=50 * GB,
        source="NVIDIA DGX B200 datasheet, an eighth of it: 8 x 400 Gb/s",
    ),
}  # fmt: skip


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


def gpu_named(name: str) -> GPU:
    """The GPU of the table.

    Raises:
        Refused: there is none of that name.
    """
    if name not in GPUS:
        raise Refused(f"--gpu {name}", "is not in the table", "use one of " + ", ".join(GPUS))
    return GPUS[name]
