"""What is refused of the options of sampling. What they do is tested with each engine."""

import pytest

from megapsft.errors import Refused
from megapsft.rollout.base import Sampling

WRONG = [
    ({"temperature": -0.1}, "temperature=-0.1: must be 0 or more"),
    ({"temperature": float("nan")}, "temperature=nan: must be a finite number"),
    ({"temperature": float("inf")}, "temperature=inf: must be a finite number"),
    ({"temperature": "1"}, "temperature='1': must be a finite number"),
    ({"top_p": 0}, "top_p=0: must be above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p=1.01: must be above 0 and at most 1"),
    ({"top_p": True}, "top_p=True: must be a finite number"),
    ({"top_k": 0}, "top_k=0: must be 1 or more, or -1"),
    ({"top_k": -2}, "top_k=-2: must be 1 or more, or -1"),
    ({"top_k": 2.0}, "top_k=2.0: must be an integer"),
    ({"max_tokens": 0}, "max_tokens=0: must be 1 or more"),
    ({"max_tokens": True}, "max_tokens=True: must be an integer"),
    ({"seed": -1}, "seed=-1: must be from 0 to 2^63 - 1"),
    ({"seed": 2**63}, f"seed={2**63}: must be from 0 to 2^63 - 1"),
    ({"stop_token_ids": [2]}, "stop_token_ids=[2]: must be a tuple"),
    ({"stop_token_ids": (2, -1)}, "stop_token_ids=(2, -1): must not be negative"),
    ({"stop_token_ids": ("2",)}, "stop_token_ids='2': must be an integer"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(Refused) as refusal:
        Sampling(**{"max_tokens": 4} | options)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"top_p": 1}, {"top_k": -1}, {"seed": 2**63 - 1}, {"stop_token_ids": (0, 5)}]
)
def test_what_can_be_is_taken(options):
    assert Sampling(max_tokens=1, **options)
