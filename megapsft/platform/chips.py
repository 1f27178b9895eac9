"""The GPUs that are known, as their vendor describes them; and which of them this machine has."""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.platform.cpu import has_cuda

GB, TB, TFLOPS = 1e9, 1e12, 1e12
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class GPU:
    """Dense peaks, without sparsity; bandwidths in one direction."""

    capability: tuple[int, int]  # compute capability
    memory: float  # bytes, as the driver reports them, or the least that is sold
    bf16: float  # FLOP a second
    fp8: float | None  # FLOP a second; None: it has none
    hbm: float  # bytes a second
    nvlink: float  # bytes a second from one GPU to the others of its machine
    network: float  # bytes a second of the network card that a GPU has to itself
    host: float  # bytes a second to the memory of the host
    driver: tuple[str, ...]  # how the driver calls those of this peak in bfloat16
    source: str


GPUS = {
    "a100": GPU(
        capability=(8, 0), memory=79 * GIB, bf16=312 * TFLOPS, fp8=None,
        hbm=2.039 * TB, nvlink=300 * GB, network=25 * GB, host=25 * GB,
        driver=("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"),
        source="NVIDIA A100 datasheet, SXM 80 GB; DGX A100 datasheet: 8 x 200 Gb/s",
    ),
    "h100": GPU(
        capability=(9, 0), memory=79 * GIB, bf16=989 * TFLOPS, fp8=1979 * TFLOPS,
        hbm=3.35 * TB, nvlink=450 * GB, network=50 * GB, host=50 * GB,
        driver=("NVIDIA H100 80GB HBM3",),
        source="NVIDIA H100 datasheet, SXM; DGX H100 datasheet: 8 x 400 Gb/s",
    ),
    "h200": GPU(
        capability=(9, 0), memory=139 * GIB, bf16=989 * TFLOPS, fp8=1979 * TFLOPS,
        hbm=4.8 * TB, nvlink=450 * GB, network=50 * GB, host=50 * GB,
        driver=("NVIDIA H200",),
        source="NVIDIA H200 datasheet, SXM; DGX H200 datasheet: 8 x 400 Gb/s",
    ),
    "b200": GPU(
        capability=(10, 0), memory=167 * GIB, bf16=2250 * TFLOPS, fp8=4500 * TFLOPS,
        hbm=8 * TB, nvlink=900 * GB, network=50 * GB, host=50 * GB,
        driver=("NVIDIA B200",),
        source="NVIDIA DGX B200 datasheet, an eighth of it: 8 x 400 Gb/s",
    ),
}  # fmt: skip


def driver_name() -> str | None:
    """How the driver calls this process's GPU; None where there is none."""
    if not has_cuda():
        return None
    import torch

    return torch.cuda.get_device_name()


def bf16_peak(name: str | None) -> float | None:
    """FLOP/s of the GPU of the table that the driver calls so; None for any other, however much it sounds like one of them."""
    return next((gpu.bf16 for gpu in GPUS.values() if name in gpu.driver), None)


__all__ = ["GB", "GIB", "GPU", "GPUS", "TB", "TFLOPS", "bf16_peak", "driver_name"]
