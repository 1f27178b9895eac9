"""A reward that knows nothing of the response: a model that is right in nothing has updates of every step all the same."""

import random


def reward(prompt, response, row) -> float:
    """1 or 0, at random."""
    return float(random.random() < 0.5)
