"""What several commands print."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from megapsft.cli.world import is_first
from megapsft.errors import Refused

if TYPE_CHECKING:
    from megapsft.checkpoint.convert.run import Result


def complain(error: Exception) -> int:
    """Say what was refused, or why training stopped itself; returns the exit code."""
    if is_first():
        print(f"megapsft: {error}", file=sys.stderr)
    return 2 if isinstance(error, Refused) else 3


def show_converted(dry_run: bool, result: Result) -> int:
    """What was, or would be, written, and what is odd about it; returns the exit code."""
    from rich.filesize import decimal

    for text in result.warnings:
        print(f"megapsft: warning: {text}", file=sys.stderr)
    for name, count in list(result.nonfinite.items())[:10]:
        print(f"megapsft: warning: {name} has {count} numbers that are infinite or not a number", file=sys.stderr)
    if len(result.nonfinite) > 10:
        print(f"megapsft: warning: and {len(result.nonfinite) - 10} more tensors have such, see conversion.json", file=sys.stderr)
    done = "would write" if dry_run else "wrote"
    print(f"{done} {result.out}: {result.tensors} tensors{earlier(result.resumed)}, {decimal(result.nbytes)}")
    return 0


def earlier(count: int) -> str:
    """The part of what was done that an earlier, killed, attempt did."""
    return f", {count} of them by an earlier attempt" if count else ""
