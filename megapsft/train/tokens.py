"""What a run keeps of single tokens where `log.tokens` asks for it, in RUN/tokens; it changes no number of the run.

    step-000010-update-000079.jsonl   every `log.tokens` steps, of each update of the step: `log.tokens_rows` samples, one a line
    counts.jsonl                      of all updates: how often each word was trained and clipped, since the line before

A line of counts is written with each checkpoint, and where an epoch begins. A run that goes on from a checkpoint drops what is
newer than it: the sums are those of a run that never stopped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megapsft.config import LogConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.metrics.records import JSONLines
from megapsft.train.rollout_record import write_records
from megapsft.train.token_counts import TokenCounts
from megapsft.train.token_rows import TokenRows, token_record
from megapsft.types import Metric, Microbatch, PolicyOutput

COUNTS = "counts.jsonl"
ROWS = re.compile(r"step-\d+-update-(\d+)\.jsonl")


class Tokens:
    """Collects on the ranks that hold the outputs; the first rank writes.

    Args:
        folder: RUN/tokens.
        vocab_size: rows of the embedding.
    """

    def __init__(self, folder: Path, log: LogConfig, template: ChatTemplate, vocab_size: int, device: torch.device | str = "cpu"):
        self.folder, self.template, self.interval = folder, template, log.tokens
        self.counts, self.rows = TokenCounts(vocab_size, device), TokenRows(log.tokens_rows, device)
        self.lines = JSONLines(folder / COUNTS) if dist.get_rank() == 0 else None
        self.step = self.update = self.epoch = 0  # of what was taken in last, counted from 1

    @property
    def due(self) -> bool:
        """Whether samples of this step are recorded."""
        return self.step % self.interval == 0

    def begin(self, step: int, epoch: float) -> None:
        """Collective. `step` begins, after `step` others and `epoch` epochs; what it trains counts for the epoch it begins in."""
        if int(epoch) + 1 != self.epoch:
            self.write_counts()
        self.step, self.epoch = step + 1, int(epoch) + 1

    def add(self, output: PolicyOutput, microbatch: Microbatch, metrics: Mapping[str, Metric]) -> None:
        """Take in one microbatch, on the one of the ranks with the same outputs that counts."""
        self.counts.add(microbatch.labels, microbatch.loss_mask, metrics["objective/clip_fraction"].values > 0)
        if self.due:
            self.rows.add(output, microbatch, metrics)

    def end_update(self, update: int, skipped: bool) -> None:
        """Collective. All microbatches of `update`, counted from 1, were taken in; of one that was skipped nothing is kept."""
        self.update = update
        self.counts.end_update(skipped)
        samples = self.rows.take() if self.due else {}
        if not samples or skipped or self.lines is None:
            return
        about = {"step": self.step, "update": update, "epoch": self.epoch}
        records = [about | {"sample": sample} | token_record(rows) for sample, rows in samples.items()]
        written = (record | {"tokens": self._words(record["token_ids"])} for record in records)
        write_records(self.folder / f"step-{self.step:06d}-update-{update:06d}.jsonl", written)

    def write_counts(self) -> None:
        """Collective. A line of what was counted since the last one; none where that is nothing."""
        counted = self.counts.take()
        if counted.ids and self.lines is not None:
            about = {"step": self.step, "update": self.update, "epoch": self.epoch}
            self.lines.write(about | {"tokens": self._words(counted.ids)} | counted._asdict())

    def close(self) -> None:
        if self.lines is not None:
            self.lines.close()

    def _words(self, ids: Sequence[int]) -> list[str]:
        return [self.template.spell([one]) for one in ids]


def forget_tokens(folder: Path, update: int) -> None:
    """Drop what stands in RUN/tokens of later updates: they will come again."""
    if (folder / COUNTS).exists():
        lines = JSONLines(folder / COUNTS)
        lines.truncate(update)
        lines.close()
    for path in folder.glob("*.jsonl"):
        named = ROWS.fullmatch(path.name)
        if named and int(named[1]) > update:
            path.unlink()


def check_tokens(log: LogConfig) -> None:
    """Refuse options of a recording that is not made."""
    if not log.tokens and log.tokens_rows != LogConfig().tokens_rows:
        rule = "says something of recorded tokens, and log.tokens=0 records none"
        raise Refused(f"log.tokens_rows={log.tokens_rows}", rule, "set log.tokens, such as 10, or leave it out")


__all__ = ["COUNTS", "Tokens", "check_tokens", "forget_tokens"]
