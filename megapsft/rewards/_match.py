"""Whether a text matches a pattern. Runs in a worker: `re` may take for ever."""

from __future__ import annotations

import re


def matches(text: str, pattern: str) -> bool:
    """1[the whole text matches]; a dot stands for a newline as well."""
    return re.fullmatch(pattern, text, re.DOTALL) is not None
