"""What nvidia-smi says of a node's GPUs: how many, whether the hardware slows them down, and errors of their memory."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from megapsft.cluster.preflight.finding import Finding, bad, good

SECONDS = 60  # a driver that hangs is a finding too
NAMES = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # of the same field; which one, depends on the driver
FIELDS = ("index", "name", "clocks.sm", "clocks.max.sm", "temperature.gpu", "ecc.errors.uncorrected.volatile.total")
SLOWED = {0x08: "hardware slowdown", 0x40: "too hot", 0x80: "power brake", 0x20: "too hot, by the driver"}  # of nvml.h


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A row of nvidia-smi; None where it does not know."""

    index: int
    name: str
    clock: int | None  # MHz
    highest_clock: int | None
    celsius: int | None
    uncorrected: int | None  # ECC errors since the driver was loaded
    slowed_by: tuple[str, ...]


def check_gpus(expected: int) -> list[Finding]:
    """Findings of this node, which is to have `expected` GPUs; none where it is to have none."""
    if expected == 0:
        return []
    try:
        gpus = parse(_ask())
    except (OSError, RuntimeError, subprocess.TimeoutExpired, ValueError) as error:
        return [bad("gpus", str(error), "nvidia-smi does not work", "restart the driver")]
    return judge_gpus(gpus, expected)


def judge_gpus(gpus: list[GPU], expected: int) -> list[Finding]:
    """One finding for each thing that is wrong, or a good one."""
    found = []
    if len(gpus) < expected:
        found.append(bad("gpus", f"{len(gpus)} GPUs", f"needs {expected}", "see dmesg for one that fell off the bus"))
    for gpu in gpus:
        if gpu.slowed_by:
            value = f"GPU {gpu.index} at {gpu.clock} of {gpu.highest_clock} MHz, {gpu.celsius} °C: {', '.join(gpu.slowed_by)}"
            found.append(bad("clocks", value, "must not be slowed down by hardware", "see to its cooling and power supply"))
        if gpu.uncorrected:
            value = f"GPU {gpu.index}: {gpu.uncorrected} uncorrected ECC errors"
            found.append(bad("ecc", value, "must be none since the driver was loaded", "reset the GPU, or replace it"))
    return found or [good("gpus", f"{len(gpus)} x {gpus[0].name}")]


def parse(text: str) -> list[GPU]:
    """Rows of `nvidia-smi --query-gpu=<reasons>,<FIELDS> --format=csv,noheader,nounits`.

    Raises:
        ValueError: it is something else.
    """
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 1 + len(FIELDS) or not cells[1].isdigit():
            raise ValueError(f"nvidia-smi printed {line!r}")
        reasons, index, name, *numbers = cells
        active = int(reasons, 16) if reasons.startswith("0x") else 0
        clock, highest, celsius, uncorrected = (int(number) if number.isdigit() else None for number in numbers)
        slowed = tuple(reason for bit, reason in SLOWED.items() if active & bit)
        gpu = GPU(
            index=int(index), name=name, clock=clock, highest_clock=highest, celsius=celsius, uncorrected=uncorrected,
            slowed_by=slowed,
        )  # fmt: skip
        gpus.append(gpu)
    return gpus


def _ask() -> str:
    if shutil.which("nvidia-smi") is None:
        raise RuntimeError("nvidia-smi is not installed")
    for reasons in NAMES:
        query = f"--query-gpu={','.join((reasons, *FIELDS))}"
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=SECONDS
        )
        if done.returncode == 0:
            return done.stdout
    raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout).strip()}")
