"""A reward that is true, but of another response: the control, from which RL must not learn."""

import random

earlier: list[float] = []
KEPT = 256  # rewards among which they are shuffled, in each worker


def reward(prompt, response, row) -> float:
    """1 where some earlier response ended with the right number; each response's reward is given once, to another one."""
    earlier.append(float(number(response) == number(row["answer"])))
    return earlier.pop(random.randrange(KEPT)) if len(earlier) > KEPT else 0.0


def number(text: str) -> str:
    """What stands behind the last ####."""
    return text.rpartition("####")[2].strip()
