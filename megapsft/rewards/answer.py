r"""The final answer of a response: the last `\boxed{...}`, else what follows GSM8K's last `####`."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # an escaped brace is the second, and opens nothing


def final_answer(text: str) -> str | None:
    r"""The answer that `text` ends with, stripped; None where it gives none, or an empty one.

    Of several complete boxes the one that ends last counts, an outer one before those inside it; a box that is not closed (a
    response that was cut off) is none. Without a box it is the rest of the line after the last `####`. Time is linear in the
    length of the text, whatever it is.

    Example:
        >>> final_answer(r"So \boxed{3}, or rather \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
        >>> final_answer("4 * 18 = 72\n#### 72")
        '72'
    """
    box = last_box(text)
    if box is None and "####" in text:
        box = text.rpartition("####")[2].lstrip(" \t").partition("\n")[0]
    return (box or "").strip() or None


def last_box(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` whose braces balance, or None; `\{`, `\}` and `\\` are no braces."""
    if "\\boxed" not in text:
        return None
    found: tuple[int, int] | None = None
    opened: list[int] = []  # of each open brace: where the contents of its box begin, or -1 for a plain brace
    for token in _TOKEN.finditer(text):
        match token[0][-1], len(token[0]):
            case "}", 1:
                start = opened.pop() if opened else -1
                if start >= 0:
                    found = (start, token.start())
            case "{", 1:
                opened.append(-1)
            case "{", length if length > 2:
                opened.append(token.end())
    return None if found is None else text[slice(*found)]
