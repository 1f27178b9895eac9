"""What a node is to have before a rank is started on it: room on its disks, the shared folder, a free port to meet at."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from megapsft.cluster.preflight.finding import Finding, bad, good
from megapsft.platform.launch import rendezvous_port

GIB = 2**30
CANARY = "canary"  # in the folder of the checks; the batch shell writes it, on the first node
CANARY_SECONDS = 10.0  # a network file system may show it late
SHARED, RUN_DISK, TEMPORARY_DISK, PORT = "shared folder", "run disk", "temporary disk", "port"  # names of checks
STEPS = 64  # that may still be started in this job, each with a port of its own


def check_disk(check: str, folder: Path, gib: float) -> Finding:
    """Whether so many GiB are free in `folder`."""
    try:
        free = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        return bad(check, f"{folder}: {error.strerror}", "must be there", "mount it, or name another (run.dir, TMPDIR)")
    value = f"{free:.1f} GiB free in {folder}"
    if free < gib:
        return bad(check, value, f"needs {gib:g} GiB", "make room, or ask for less in MEGAPSFT_PREFLIGHT_OPTIONS")
    return good(check, value)


def check_shared(folder: Path, token: str) -> Finding:
    """Whether this node sees what the batch shell wrote into `folder`, and may write there itself."""
    deadline = time.monotonic() + CANARY_SECONDS
    while True:
        try:
            seen = (folder / CANARY).read_text().strip()
        except OSError as error:
            seen = error.strerror
        if seen == token or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    if seen != token:
        value, rule = f"{folder / CANARY}: {seen!r}", f"must say {token!r}, as the first node wrote it"
        return bad(SHARED, value, rule, "mount the shared file system, or use a run.dir on it")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return bad(SHARED, f"{folder}: {error.strerror}", "must be writable", "see its permissions, quota and mount")
    return good(SHARED, f"{folder} is shared")


def check_ports(job: int, step: int) -> Finding:
    """Whether the ports at which the ranks of this job's next steps meet are free on this node, the first.

    Args:
        step: number of the step that this process is in.
    """
    given = os.environ.get("MASTER_PORT")
    ports = [int(given)] if given else [rendezvous_port(job, later) for later in range(step + 1, step + 1 + STEPS)]
    taken = [str(port) for port in ports if not _free(port)]
    if taken:
        rule = "must be free: ranks meet there"
        return bad(PORT, f"port {', '.join(taken)} is taken", rule, "see `ss -ltnp` there, or export another MASTER_PORT")
    return good(PORT, f"ports {ports[0]} ... {ports[-1]} are free")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed lately is free
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True
