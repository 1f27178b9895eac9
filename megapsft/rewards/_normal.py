"""Answers in one spelling, and as numbers: what can be compared without computer algebra."""

from __future__ import annotations

import re
from decimal import Decimal

MOST_DIGITS = 1000  # a longer one is compared as text

_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?")
_NOT_SEEN = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;: ()]|[$\s]+")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}\\]*)\}")


def normalised(answer: str) -> str:
    r"""The answer without what does not change it: dollars, white space, `\left`, `\text{}` around words, a full stop at the end.

    Example:
        >>> normalised(r"$\left( 3, \dfrac{\pi}{2} \right)$.")
        '(3,\\frac{\\pi}{2})'
    """
    answer = _TEXT.sub(r"\1", answer.replace("{,}", ",").replace("\\$", ""))
    answer = _FRACTION.sub(r"\\frac", _NOT_SEEN.sub("", answer))
    return answer.removesuffix(".") if not answer.endswith("..") else answer


def number(answer: str) -> Decimal | None:
    """The number that a normalised answer is, exactly; None where it is none. Commas stand between thousands.

    Example:
        >>> number("1,234.50") == number("1234.5")
        True
    """
    if len(answer) > MOST_DIGITS or not _NUMBER.fullmatch(answer) or not any(map(str.isdigit, answer)):
        return None
    return Decimal(answer.replace(",", ""))
