"""The cluster of tests/slurm/cluster.py, which is up already: `make test-slurm` starts it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Jobs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Six idle nodes; clients of Slurm that a test starts find it in their environment."""
    found = Cluster.of_environment(int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))
    if set(found.states()) != set(found.names):
        pytest.fail(f"no cluster in {found.folder}; run `make test-slurm`, or `python -m tests.slurm.cluster up` before pytest")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Iterator[Jobs]:
    """To submit with; what is left of them when the test is over is cancelled."""
    made = Jobs(cluster, tmp_path)
    yield made
    made.cancel()
