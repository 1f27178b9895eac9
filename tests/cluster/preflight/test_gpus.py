"""What is made of the words of nvidia-smi. Not here: a real GPU."""

from __future__ import annotations

import os

import pytest

from megapsft.cluster.preflight.gpus import check_gpus, judge_gpus, parse

# in the form of `nvidia-smi --query-gpu=clocks_event_reasons.active,index,name,clocks.sm,clocks.max.sm,temperature.gpu,ecc...`
IDLE = "0x0000000000000001, 0, NVIDIA H100 80GB HBM3, 345, 1980, 31, 0\n"
IDLE += "0x0000000000000004, 1, NVIDIA H100 80GB HBM3, 1755, 1980, 58, 0\n"
SLOWED = "0x0000000000000048, 2, NVIDIA H100 80GB HBM3, 540, 1980, 91, 0\n"
BRAKED = "0x0000000000000080, 3, NVIDIA H100 80GB HBM3, 960, 1980, 55, 0\n"
ECC = "0x0000000000000000, 4, NVIDIA A100-SXM4-80GB, 1410, 1410, 40, 3\n"
UNKNOWN = "[N/A], 0, NVIDIA GeForce RTX 3090, 210, 2100, 35, [N/A]\n"


def checks(text: str, expected: int) -> list[tuple[str, bool, str]]:
    return [(finding.check, finding.good, finding.value) for finding in judge_gpus(parse(text), expected)]


def test_idle_and_power_capped_gpus_are_good():
    assert checks(IDLE, 2) == [("gpus", True, "2 x NVIDIA H100 80GB HBM3")]


def test_fewer_than_slurm_promised_are_not():
    assert checks(IDLE, 8) == [("gpus", False, "2 GPUs")]
    assert checks("", 1) == [("gpus", False, "0 GPUs")]


def test_what_hardware_slows_down_is_named_with_its_clock_and_why():
    assert checks(IDLE + SLOWED + BRAKED, 4) == [
        ("clocks", False, "GPU 2 at 540 of 1980 MHz, 91 °C: hardware slowdown, too hot"),
        ("clocks", False, "GPU 3 at 960 of 1980 MHz, 55 °C: power brake"),
    ]


def test_errors_of_memory_that_were_not_corrected():
    assert checks(ECC, 1) == [("ecc", False, "GPU 4: 3 uncorrected ECC errors")]


def test_what_a_gpu_does_not_know_is_no_finding():
    assert checks(UNKNOWN, 1) == [("gpus", True, "1 x NVIDIA GeForce RTX 3090")]


@pytest.mark.parametrize("text", ["No devices were found\n", "0x1, 0, NVIDIA H100\n"])
def test_other_words_are_no_gpus(text):
    with pytest.raises(ValueError, match="nvidia-smi printed"):
        parse(text)


def script(folder, body: str, monkeypatch) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_name_of_the_field_that_an_older_driver_knows_is_found(tmp_path, monkeypatch):
    body = f'case "$1" in *clocks_event*) echo "not a valid field to query"; exit 2;; esac; printf "{IDLE[:-1]}"'
    script(tmp_path, body.replace("\n0x", "\\n0x"), monkeypatch)
    (finding,) = check_gpus(2)
    assert (finding.good, finding.value) == (True, "2 x NVIDIA H100 80GB HBM3")


def test_a_driver_that_does_not_work_is_a_finding_in_its_own_words(tmp_path, monkeypatch):
    script(tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch' >&2; exit 18", monkeypatch)
    (finding,) = check_gpus(8)
    assert not finding.good
    assert "Driver/library version mismatch" in finding.value


def test_where_no_gpu_is_expected_nobody_is_asked(tmp_path, monkeypatch):
    script(tmp_path, "exit 1", monkeypatch)
    assert check_gpus(0) == []
