"""Gathering of the distributed optimizer's parameters, where FP8 weights need more than their bytes. Splits: tests/invariants."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core import fp8_utils

from megapsft.policy.gather import gather, gather_stale


class Chunk(torch.nn.Linear):
    """What a chunk is to it: parameters, and Megatron's gathering, which is noted."""

    def __init__(self, overlapped: bool, did: list[str]):
        super().__init__(2, 2)
        self.ddp_config = SimpleNamespace(overlap_param_gather=overlapped)
        self.did = did

    def start_param_sync(self, force_sync: bool) -> None:
        assert force_sync
        self.did.append("gathered")


@pytest.mark.parametrize(("overlapped", "expected"), [(True, ["gathered", "finished"]), (False, ["gathered"])])
def test_transposed_copies_of_fp8_weights_follow_a_forced_gathering(overlapped, expected, monkeypatch):
    """Megatron before 0.18 leaves them where gathering overlaps; where it does not, they are made by it."""
    did: list[str] = []
    chunk = Chunk(overlapped, did)
    monkeypatch.setattr(fp8_utils, "is_float8tensor", lambda parameter: parameter is chunk.weight)
    monkeypatch.setattr(
        fp8_utils, "post_all_gather_processing", lambda weights: did.append("finished" * (weights == [chunk.weight]))
    )
    gather([chunk])
    assert did == expected
    did.clear()
    gather_stale([chunk])
    assert did == (expected if overlapped else [])


def test_other_weights_need_nothing_more(monkeypatch):
    did: list[str] = []
    monkeypatch.setattr(fp8_utils, "post_all_gather_processing", lambda weights: did.append("finished"))
    gather([Chunk(True, did)])
    assert did == ["gathered"]
