"""Records in a file: one JSON object a line, and a line counts once its end is written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapsft.errors import Refused
from megapsft.output.whole import write_whole


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All records of a file that `JSONLines` wrote; a torn last line (the run was killed while writing) is left out.

    Raises:
        Refused: no such file, or a whole line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise Refused(str(path), "is not a file", "name the metrics.jsonl of a run")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise Refused(f"{path}:{number}", "is not a JSON object", "remove the line")
        records.append(record)
    return records


class JSONLines:
    """Appends records to a file, each flushed as it is written. Numbers that are not finite become null.

    Example:
        >>> lines = JSONLines("metrics.jsonl")
        >>> lines.write({"update": 1, "train/loss": 0.65})
        >>> lines.truncate(0)  # resumed from before update 1, which will come again
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            written = self.path.read_bytes()
            if not written.endswith(b"\n"):  # or the first new record would be glued to the torn one
                os.truncate(self.path, written.rfind(b"\n") + 1)
        self._file = self.path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def truncate(self, update: int) -> None:
        """Keep only records up to and with `update`. A crash leaves the old file or the new one, never half of one."""
        kept = [record for record in read_records(self.path) if record["update"] <= update]
        self._file.close()
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a")

    def close(self) -> None:
        self._file.close()
