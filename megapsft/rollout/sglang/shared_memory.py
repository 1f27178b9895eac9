"""Tensors for a server on this host, through its shared memory.

SGLang's protocol for this is a pickle of torch's handles to the memory, in an HTTP request. This is the one file that writes it,
and only for servers on loopback; nothing here reads a pickle. The server reads it with a list of the classes that may be in one.
"""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
import torch.multiprocessing
from torch import Tensor

from megapsft.errors import Refused

FOLDER = Path("/dev/shm")  # where Linux has it
STDERR = 2
_strategy = threading.Lock()  # torch keeps one for the process


def allocate(size: int) -> Tensor:
    """uint8 [size] in shared memory, all of which torch has the system fill with zeros.

    Raises:
        Refused: there is no room for it: a write beyond would kill this process.
    """
    if FOLDER.is_dir():
        status = os.statvfs(FOLDER)
        free = status.f_bavail * status.f_frsize
        if free < size:
            rule = f"needs {size:,} bytes of shared memory, and {FOLDER} has {free:,}"
            remedy = "use a smaller rollout.bucket_bytes, or rollout.weight_update=disk"
            raise Refused("rollout.weight_update=tensor", rule, remedy)
    with _not_inherited(STDERR):
        storage = torch.UntypedStorage._new_using_filename_cpu(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@contextmanager
def _not_inherited(descriptor: int) -> Iterator[None]:
    """torch starts a process for its shared memory, which lives as long as a server that has had some: whoever reads our stderr
    to its end (a pipe, a launcher) would wait for that server."""
    with _strategy:
        before = os.get_inheritable(descriptor)
        os.set_inheritable(descriptor, False)
        try:
            yield
        finally:
            os.set_inheritable(descriptor, before)


def payload(named: Sequence[tuple[str, Tensor]]) -> str:
    """What a server's `serialized_named_tensors` has for one of its ranks: views of one allocation, by name."""
    written = io.BytesIO()
    with _strategy:  # the other strategy hands file descriptors over by a key that the server has not: it dies of it
        before = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")
        try:
            ForkingPickler(written).dump(list(named))
        finally:
            torch.multiprocessing.set_sharing_strategy(before)
    return base64.b64encode(written.getvalue()).decode()
