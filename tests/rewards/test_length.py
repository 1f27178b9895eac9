"""The price on length."""

import pytest

from megapsft.errors import Refused
from megapsft.rewards._base import Response
from megapsft.rewards.length import Length

VARIANTS = [{"soft_limit": 0, "price": 0.25, "most": 2.0}]  # for the contract


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 0.0), (80, 0.0), (100, 0.0), (101, -0.01), (150, -0.5), (200, -1.0), (900, -1.0)]
)
def test_a_straight_line_beyond_the_soft_limit(tokens, value):
    reward = Length(soft_limit=100, price=0.01)
    (part,) = reward([Response(prompt="?", text="text", tokens=tokens, source="a.jsonl:1")], None)
    assert part.value == pytest.approx(value)
    assert str(part.value) != "-0.0"


@pytest.mark.parametrize("options", [{"soft_limit": -1}, {"price": -0.1}, {"most": -1.0}, {"price": float("nan")}])
def test_refuses_and_says_what_would_be_right(options):
    with pytest.raises(Refused, match="must be 0 or more"):
        Length(**options)
