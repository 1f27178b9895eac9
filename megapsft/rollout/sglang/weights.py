"""Ways of weights to servers: in buckets through shared memory or a process group, or as a folder that they read."""

from __future__ import annotations

import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megapsft.rollout.sglang import shared_memory
from megapsft.rollout.sglang.client import Client, Unanswered, on_loopback
from megapsft.rollout.sglang.fleet import Fleet, Member

ALIGNMENT = 64  # bytes
FIRST_BUCKET = 8 * 2**20  # bytes, of shared memory
Bucket = list[tuple[str, Tensor]]


def buckets(stream: Iterable[tuple[str, Tensor | None]], size: int, allocate: Callable[[int, int], Tensor]) -> Iterator[Bucket]:
    """Copies of the tensors, in allocations of at most `size` bytes; a larger tensor has one of its own.

    Args:
        allocate: (bytes at least, bytes at most) -> uint8 [bytes].
    """
    flat, used, bucket = torch.empty(0, dtype=torch.uint8), 0, []
    for name, tensor in stream:
        assert tensor is not None, f"{name} has no tensor on the rank that sends it"
        wanted = tensor.numel() * tensor.element_size()
        if bucket and used + wanted > flat.numel():
            yield bucket
            bucket, used = [], 0
            del flat  # the next may need its memory
            flat = torch.empty(0, dtype=torch.uint8)
        if not bucket:
            flat, used = allocate(wanted, max(size, wanted)), 0
        view = flat[used : used + wanted].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        bucket.append((name, view))
        used += wanted + -wanted % ALIGNMENT
    if bucket:
        yield bucket


class Copy:
    """The current weights on disk, for servers that start again or read their weights there: a folder for each version."""

    def __init__(self, folder: Path, version: int):
        self.folder = folder / f"{version}-{uuid.uuid4().hex[:8]}"
        self._unfinished = self.folder.with_suffix(".unfinished")
        self._unfinished.mkdir(parents=True)
        self._files = 0

    def add(self, bucket: Bucket) -> None:
        self._files += 1
        save_file(dict(bucket), self._unfinished / f"model-{self._files:05d}.safetensors")

    def end(self) -> Path:
        self._unfinished.rename(self.folder)
        return self.folder

    @staticmethod
    def forget_others(folder: Path, kept: Path | None) -> None:
        for other in folder.iterdir() if folder.is_dir() else ():
            if other != kept:
                shutil.rmtree(other, ignore_errors=True)


class ByMemory:
    """Through the shared memory of this host."""

    def __init__(self, seconds: float):
        self._seconds, self._next = seconds, FIRST_BUCKET

    def open(self, fleet: Fleet) -> None:
        fleet.each(lambda target: begin(target, self._seconds))

    def allocate(self, least: int, most: int) -> Tensor:
        """Each twice the one before: how much will come is not known here, and what is not needed costs time too."""
        size = min(max(least, self._next), most)
        self._next *= 2
        return shared_memory.allocate(size)

    def send(self, fleet: Fleet, bucket: Bucket) -> None:
        def post(target: Member) -> None:
            ranks = [shared_memory.payload(bucket) for _ in range(target.tp_size)]  # each lets go of one
            target.client.post("/update_weights_from_tensor", self._seconds, serialized_named_tensors=ranks, flush_cache=False)

        fleet.each(post)

    def close(self, fleet: Fleet) -> None:
        fleet.each(lambda target: target.client.post("/end_weight_update", self._seconds))


class ByGroup:
    """By a process group of this process and all ranks of all servers, made anew for each update: who is in it is known."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._name = f"megapsft-{uuid.uuid4().hex[:8]}"
        self._group: Any = None
        self._device = torch.device("cpu")

    def open(self, fleet: Fleet) -> None:
        targets = list(fleet.targets())
        if not targets:
            return
        cuda = torch.cuda.is_available() and all(target.device == "cuda" for target in targets)
        self._device, backend = (torch.device("cuda"), "nccl") if cuda else (torch.device("cpu"), "gloo")
        first, offsets = 1, {}
        for target in targets:
            offsets[target.client.url] = first
            first += target.tp_size
        host = own_address(targets[0].client.url)
        listening = socket.socket()
        listening.bind((host, 0))
        listening.listen()
        port, limit = listening.getsockname()[1], timedelta(seconds=self._seconds)

        def join() -> None:
            store = dist.TCPStore(
                host, port, first, True, limit, wait_for_workers=False, master_listen_fd=listening.detach()
            )  # fmt: skip
            self._group = new_group(self._name, backend, store, first, limit)

        def post(target: Member) -> None:
            target.client.post(
                "/init_weights_update_group", self._seconds, master_address=host, master_port=port, world_size=first,
                rank_offset=offsets[target.client.url], group_name=self._name, backend=backend,
            )  # fmt: skip

        fleet.each(post, join)
        fleet.each(lambda target: begin(target, self._seconds))

    def allocate(self, least: int, most: int) -> Tensor:
        return torch.empty(most, dtype=torch.uint8, device=self._device)

    def send(self, fleet: Fleet, bucket: Bucket) -> None:
        if self._group is None:
            return
        names, dtypes, shapes = zip(*((n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in bucket), strict=True)
        failed = threading.Event()

        def broadcast() -> None:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = 0, 0
            works = [self._group.broadcast([tensor], options) for _, tensor in bucket]
            for work in works:
                if failed.is_set():
                    raise Unanswered("a server left the process group")
                work.wait(timedelta(seconds=self._seconds))

        def post(target: Member) -> None:
            try:
                target.client.post(
                    "/update_weights_from_distributed", self._seconds, names=names, dtypes=dtypes, shapes=shapes,
                    group_name=self._name, flush_cache=False,
                )  # fmt: skip
            except Unanswered:
                failed.set()
                raise

        fleet.each(post, broadcast)

    def close(self, fleet: Fleet) -> None:
        fleet.each(lambda target: target.client.post("/end_weight_update", self._seconds))
        fleet.each(lambda target: target.client.post("/destroy_weights_update_group", self._seconds, group_name=self._name))
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


def begin(target: Member, seconds: float) -> None:
    """Also where an update before this one was cut off."""
    try:
        target.client.post("/begin_weight_update", seconds)
    except Unanswered as error:
        if "already open" not in str(error):
            raise
        target.client.post("/end_weight_update", seconds)
        target.client.post("/begin_weight_update", seconds)


def read_folder(client: Client, folder: Path, seconds: float) -> None:
    """Have it read the weights of a folder that `Copy` wrote."""
    path = str(folder.resolve())
    # or it would be read as the server's first weights were, which may have been none
    client.post("/update_weights_from_disk", seconds, model_path=path, load_format="auto", flush_cache=False)


def own_address(url: str) -> str:
    """The address of this host that the server of `url` reaches."""
    if on_loopback(url):
        return "127.0.0.1"
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        return probe.getsockname()[0]


def new_group(name: str, backend: str, store: Any, size: int, limit: timedelta) -> Any:
    """A group beside the default one, of whose world the servers are no part. torch has no public way to make it; SGLang's side
    is made by this same function."""
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

    prefixed = PrefixStore(name, store)
    group, _ = _new_process_group_helper(size, 0, [], Backend(backend), prefixed, group_name=name, timeout=limit)
    _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
