"""What trackers were given, read back from their own files."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768  # of LevelDB's log, which a .wandb file is behind its own header


def events(directory: Path) -> EventAccumulator:
    """All scalars and images of TensorBoard that it shows."""
    found = EventAccumulator(str(directory), size_guidance={SCALARS: 0, IMAGES: 0})
    found.Reload()
    return found


def texts(directory: Path, tag: str) -> list[tuple[int, str]]:
    """(x, text) of those that TensorBoard shows under a tag."""
    found = plugin_event_accumulator.EventAccumulator(str(directory))  # the other one leaves texts that were taken back
    found.Reload()
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors(f"{tag}/text_summary")]


def rows(log: Path, seconds: float = 60) -> list[dict[str, Any]]:
    """The rows of a .wandb file in their order: key -> JSON, `_step` is the row's number. The run has ended, but wandb's own
    process may write the end a while after `finish` has returned.
    """
    deadline = time.monotonic() + seconds
    while not (records := list(_records(log.read_bytes()))) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, f"no end in {log}"
        time.sleep(0.1)
    return [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def _records(data: bytes) -> Iterator[Record]:
    at, whole = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little for a header: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):  # being written
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""
