"""What a run is told of SGLang servers that are steps of its job.

    python -m megapsft.cluster.slurm.servers WEIGHT_UPDATE URL ...      (as launchers/slurm/job.sh does)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from megapsft.train.rollout_options import DEFAULTS, OF_SERVERS_STARTED


def overrides(weight_update: str, urls: Sequence[str]) -> list[str]:
    """`key=value` arguments: where the servers are, and nothing of those that the run would start by itself.

    Args:
        weight_update: as configured; through this host's memory the weights do not get to other hosts.
    """
    found = [f"rollout.urls={json.dumps(list(urls))}"]
    found += [f"rollout.{key}={json.dumps(getattr(DEFAULTS, key))}" for key in OF_SERVERS_STARTED]
    return found + (["rollout.weight_update=distributed"] if weight_update == "tensor" else [])


if __name__ == "__main__":
    print("\n".join(overrides(sys.argv[1], sys.argv[2:])))
