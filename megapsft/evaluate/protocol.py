"""How the papers measure: responses a problem, and how they are sampled."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is done where the user does not say otherwise.

    Source: Proximal Supervised Fine-Tuning (Zhu et al., ICLR 2026), section 4.3 and Table 1; pass@1 as in its Appendix C.7.2.
    """

    n: int = 8  # responses to each problem
    max_tokens: int = 10_240  # of a response
    temperature: float = 0.7
    top_p: float = 0.95


BY_NAME = {  # how the name of a file begins, letters and digits alone; the longest that fits counts
    "aime": Protocol(n=32),
    "amc": Protocol(n=32),
    "math500": Protocol(n=8),
    "olympiad": Protocol(n=8),
    "minerva": Protocol(n=8),
    "gpqa": Protocol(n=8),
    "arc": Protocol(n=8),
    "truthfulqa": Protocol(n=8),
    "ifeval": Protocol(n=8, max_tokens=4096),
    "mmlupro": Protocol(n=1),
    "supergpqa": Protocol(n=1),
    "headqa": Protocol(n=1),
    "gsm8k": Protocol(n=1),  # of its alignment experiments, Table 16
}


def protocol_of(benchmark: str) -> Protocol:
    """That of the benchmark by its name; avg@8, which is what most are measured by, where it is not known.

    Example:
        >>> protocol_of("AIME-2024").n, protocol_of("mine").n
        (32, 8)
    """
    name = re.sub(r"[^a-z0-9]", "", benchmark.lower())
    known = [prefix for prefix in BY_NAME if name.startswith(prefix)]
    return BY_NAME[max(known, key=len)] if known else Protocol()
