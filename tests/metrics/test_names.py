"""The table of metric keys."""

import re

from megapsft.metrics.names import METRICS


def test_keys_are_group_and_name():
    assert all(re.fullmatch(r"[a-z]+/[a-z0-9_]+", key) for key in METRICS)
    assert all(METRICS.values())
