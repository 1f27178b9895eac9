"""Whether two answers are the same in mathematics, as math-verify judges it. Runs in a worker."""

from __future__ import annotations

import logging

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off: a worker has better ones

# LaTeX only: the other extraction of math-verify hands the text to sympy's parse_expr, which evaluates it as Python
_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]


def equal(answer: str, reference: str) -> bool:
    """1[both are understood and `answer` equals `reference`]; the order matters: `x = 5` answers `5`."""
    read = _read(answer)
    return bool(read) and bool(verify(_read(reference), read, timeout_seconds=None))


def _read(answer: str) -> list[Basic | MatrixBase]:
    boxed = f"\\boxed{{{answer}}}"
    return parse(boxed, _LATEX, fallback_mode="no_fallback", parsing_timeout=None)
