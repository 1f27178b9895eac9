"""Whether a response is right, as a reward of the user's own: its worker, which each evaluation starts, has nothing to import."""

import re
from collections.abc import Mapping

FINAL = re.compile(r"#### (\d+)\s*$")


def right(prompt: str, response: str, row: Mapping[str, str]) -> float:
    """1[the response ends with `#### N`, N being the number at the end of the row's answer, digit by digit]."""
    found = FINAL.search(response)
    return float(found is not None and found[1] == FINAL.search(row["answer"])[1])
