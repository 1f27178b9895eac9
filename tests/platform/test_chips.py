"""Whose peak is known."""

from megapsft.platform.chips import GPUS, bf16_peak, driver_name
from megapsft.platform.cpu import has_cuda


def test_a_peak_is_that_of_the_very_chip_or_none():
    assert bf16_peak("NVIDIA H200") == bf16_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert bf16_peak("NVIDIA A100-SXM4-40GB") == 312e12
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 MIG 1g.18gb", "NVIDIA H20", "cpu", None):
        assert bf16_peak(other) is None


def test_no_name_stands_for_two_chips():
    names = [name for gpu in GPUS.values() for name in gpu.driver]
    assert len(names) == len(set(names))


def test_without_a_gpu_there_is_no_name():
    assert (driver_name() is None) == (not has_cuda())
