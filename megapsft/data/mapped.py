"""What a file became, as a folder of arrays that processes map instead of holding them: a group is made when it is asked for.

All processes of a node share the pages that are read, and those that are not are never loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megapsft.data.dataset import Dataset
from megapsft.data.preferences import Preferences
from megapsft.data.rollouts import Rollouts
from megapsft.errors import Refused
from megapsft.types import Group, Sample

META = "dataset.json"  # which kind, and all of it but the groups
KINDS: Mapping[str, type[Dataset]] = {kind.__name__: kind for kind in (Dataset, Preferences, Rollouts)}
PER_TOKEN = {"token_ids": np.int32, "loss_mask": np.bool_, "rollout_logprobs": np.float32, "ref_logprobs": np.float32}
PER_SAMPLE = {"demonstration": np.bool_, "reward": np.float64}  # the other fields of a sample are not of files
OPTIONAL = ("rollout_logprobs", "ref_logprobs")  # all samples of a file have them, or none


class MappedGroups(Sequence[Group]):
    """The groups in the order of the file. Arrays of their samples are views of the mapped ones, and read-only.

    Args:
        arrays: `<column>` of PER_TOKEN [tokens] and PER_SAMPLE [samples]; `source` [bytes] of UTF-8; `tokens_before` and
            `bytes_before` [samples + 1]; `samples_before` [groups + 1].

    Raises:
        ValueError: they do not fit together.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._columns = {name: arrays[name] for name in PER_TOKEN if name in arrays or name not in OPTIONAL}
        self._values = {name: arrays[name] for name in PER_SAMPLE}
        self._source = arrays["source"]
        self._tokens, self._bytes, self._samples = (arrays[f"{name}_before"] for name in ("tokens", "bytes", "samples"))
        samples = int(self._samples[-1])
        sizes = {name: (len(column), int(self._tokens[-1])) for name, column in self._columns.items()}
        sizes |= {name: (len(values), samples) for name, values in self._values.items()}
        sizes |= {"source": (len(self._source), int(self._bytes[-1]))}
        sizes |= {"tokens_before": (len(self._tokens), samples + 1), "bytes_before": (len(self._bytes), samples + 1)}
        for name, (there, wanted) in sizes.items():
            if there != wanted:
                raise ValueError(f"{name} has {there} entries, not {wanted}")

    def __len__(self) -> int:
        return len(self._samples) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]  # which counts from the end where it is negative, and raises IndexError
        return tuple(self._sample(row) for row in range(self._samples[number], self._samples[number + 1]))

    def _sample(self, row: int) -> Sample:
        tokens = slice(self._tokens[row], self._tokens[row + 1])
        return Sample(
            source=self._source[self._bytes[row] : self._bytes[row + 1]].tobytes().decode(),
            **{name: column[tokens] for name, column in self._columns.items()},
            **{name: values[row].item() for name, values in self._values.items()},
        )


def write(dataset: Dataset, folder: Path) -> None:
    """Into a folder that is there and empty; on the disk when this returns.

    Raises:
        OSError: no room, or it cannot be written to.
    """
    samples = dataset.samples
    columns = {
        name: (dtype, [getattr(sample, name) for sample in samples])
        for name, dtype in PER_TOKEN.items()
        if name not in OPTIONAL or getattr(samples[0], name) is not None
    }
    columns |= {name: (dtype, [np.array([getattr(s, name) for s in samples])]) for name, dtype in PER_SAMPLE.items()}
    sources = [np.frombuffer(sample.source.encode(), np.uint8) for sample in samples]
    columns |= {"source": (np.uint8, sources)}
    lengths = {"tokens": samples, "bytes": sources, "samples": dataset.groups}
    columns |= {f"{name}_before": (np.int64, [_before(several)]) for name, several in lengths.items()}
    for name, (dtype, parts) in columns.items():
        _write_array(folder / f"{name}.npy", np.dtype(dtype), parts)
    whole = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset) if field.name != "groups"}
    text = json.dumps({"kind": type(dataset).__name__, "arrays": list(columns), "fields": whole})
    with (folder / META).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> Dataset:
    """What `write` has written; its arrays are mapped, not read.

    Raises:
        Refused: it is something else, or less.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        arrays = {name: _map(folder / f"{name}.npy") for name in meta["arrays"]}
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in meta["fields"].items()}
        return KINDS[meta["kind"]](groups=MappedGroups(arrays), **fields)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        rule = f"is not whole: {type(error).__name__}: {' '.join(str(error).split())}"
        raise Refused(str(folder), rule, "delete this folder: it is made anew from the data") from None


def _map(path: Path) -> np.ndarray:
    """[entries], as a plain view: what `np.memmap` adds to each slice of itself takes longer than the slice."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _before(several: Sequence) -> np.ndarray:
    """[several + 1] how many entries all before each have."""
    return np.concatenate([[0], np.cumsum([len(one) for one in several])])


def _write_array(path: Path, dtype: np.dtype, parts: Sequence[np.ndarray]) -> None:
    """The parts end to end, as one .npy file. Not through a map: a disk that is full would kill the process."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (sum(map(len, parts)),)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype))
        file.flush()
        os.fsync(file.fileno())


__all__ = ["MappedGroups", "read", "write"]
