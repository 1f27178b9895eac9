"""Write into the configs of the papers' runs what they take, as `megapsft plan` says: python -m tests.cluster.comments"""

from __future__ import annotations

import re
from pathlib import Path

from megapsft.cluster.estimate import estimate
from megapsft.cluster.hardware import Machines
from megapsft.cluster.model_folder import shape_of_model
from megapsft.cluster.propose import propose
from megapsft.config import load_config
from megapsft.errors import Refused
from megapsft.platform.chips import GIB, GPUS
from tests.shipped import OF_PAPERS

HEADING = "# Nodes of 8 H100, as `megapsft plan` says:"
NODES = (1, 2, 4, 8)
LINE = re.compile(r"#   \d+: ")


def commented(path: Path) -> str:
    """The text of a config with what it takes below the comment at its head."""
    lines = [line for line in path.read_text().splitlines() if line != HEADING and not LINE.match(line)]
    head = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join([*lines[:head], HEADING, *(taken(path, nodes) for nodes in NODES), *lines[head:]]) + "\n"


def taken(path: Path, nodes: int) -> str:
    """What it takes on so many nodes, or what would fit there instead."""
    config = load_config(path)
    hf = shape_of_model(path, config.model.path)
    machines = Machines(gpu=GPUS["h100"], nodes=nodes, gpus_per_node=8)
    try:
        found = estimate(config, hf, machines)
    except Refused as error:
        return f"#   {nodes}: refused, {error.value} {error.rule}"
    memory = f"{found.peak / GIB:.0f} of {found.usable / GIB:.0f} GiB"
    if found.fits:
        return f"#   {nodes}: {memory}, {found.time.total:.1f} s a step, {found.tokens_per_second:,.0f} tokens/s"
    others = propose(config, hf, machines, 1)
    instead = [f"{other.mesh.describe()} does, {other.time.total:.1f} s a step" for other in others] or ["no other split does"]
    return f"#   {nodes}: does not fit, {memory}; {instead[0]}"


if __name__ == "__main__":
    for file in OF_PAPERS:
        file.write_text(commented(file))
