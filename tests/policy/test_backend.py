"""Which backend the head has, and what the user is told. That the check passes where kernels run: test_head_kernels.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megapsft.config import ParallelConfig
from megapsft.errors import Refused
from megapsft.parallel import ModelShape, initialize, plan_mesh, shutdown
from megapsft.policy.backend import AS_SAID, choose_backend, failure, settled, working_backend
from tests.ranks import run_ranks

SHAPE = ModelShape(num_layers=1, num_attention_heads=1, num_query_groups=1, ffn_hidden_size=4, num_experts=0)
HERE = "triton" if torch.cuda.is_available() else "torch"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_what_is_named_is_taken(name):
    assert choose_backend(name) == (name, AS_SAID)


def test_auto_says_why():
    backend, why = choose_backend("auto")
    assert backend == HERE
    assert why == ("CUDA and Triton are here" if backend == "triton" else "there is no CUDA device here")


def test_triton_is_refused_where_there_is_no_cuda():
    code = """
from megapsft.policy.backend import choose_backend
try:
    choose_backend("triton")
except ValueError as error:
    print(error)
"""
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}  # and not TRITON_INTERPRET
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    rule = "needs Triton's kernels to run: there is no CUDA device here"
    assert done.stdout.strip() == f"model.logprob_backend=triton: {rule}; use auto or torch", done.stderr


def test_kernels_that_do_not_run_are_found_out():
    """The real ones, launched where no driver is; on a GPU they run."""
    assert failure() is None if HERE == "triton" else failure().startswith("Triton's kernels do not run (RuntimeError: ")


def test_one_rank_on_which_they_do_not_run_decides_for_all():
    reason = "Triton's kernels do not run (OutOfResources: shared memory)"
    assert settled("auto", [None, None]) == ("triton", "CUDA and Triton are here")
    assert settled("auto", [None, reason]) == ("torch", reason)
    with pytest.raises(Refused, match=r"triton: needs Triton's kernels to run: .* \(OutOfResources: shared memory\); use auto"):
        settled("triton", [reason, None])


def test_ranks_agree():
    assert run_ranks(2, _working) == [choose_backend("auto")] * 2


def _working():
    initialize(plan_mesh(ParallelConfig(), 2, SHAPE, False), ParallelConfig(), seed=1)
    found = working_backend("auto")
    shutdown()
    return found
