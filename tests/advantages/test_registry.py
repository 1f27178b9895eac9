"""Advantages as an objective asks for them. Not here: the estimators themselves."""

import numpy as np
import pytest

from megapsft.advantages.registry import estimate
from megapsft.types import AdvantageOptions

REWARDS, GROUPS = np.array([1.0, 0.0, 0.0, 3.0]), np.array([0, 0, 0, 1])
STD = np.sqrt(1 / 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"estimator": "group"}, [2 / 3 / (STD + 1e-6), -1 / 3 / (STD + 1e-6), -1 / 3 / (STD + 1e-6), 3 / (1 + 1e-6)]),
        ({"estimator": "group", "norm_by_std": False}, [2 / 3, -1 / 3, -1 / 3, 3]),
        ({"estimator": "group", "norm_by_std": False, "singleton": "zero"}, [2 / 3, -1 / 3, -1 / 3, 0]),
        ({"estimator": "rloo"}, [1, -0.5, -0.5, 3]),
        ({"estimator": "rloo", "singleton": "zero"}, [1, -0.5, -0.5, 0]),
    ],
)
def test_every_option_reaches_the_estimator(options, expected):
    np.testing.assert_allclose(estimate(AdvantageOptions(**options), REWARDS, GROUPS), expected, rtol=1e-12)


def test_gae_needs_values():
    with pytest.raises(ValueError, match="needs more than rewards"):
        estimate(AdvantageOptions(estimator="gae"), REWARDS, GROUPS)
