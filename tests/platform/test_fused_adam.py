"""Our AdamW against torch's. Its place in Megatron's optimizers is tested by tests/checkpoint/test_dist.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megapsft.platform.fused_adam import FusedAdam

OPTIONS = dict(lr=3e-3, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.1)


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (11,), ())]


def steps(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** (step % 3 - 1)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_adamw_of_torch(weight_decay):
    ours, theirs = parameters(), parameters()
    options = OPTIONS | {"weight_decay": weight_decay}
    steps(FusedAdam(ours, **options), ours, 20)
    steps(torch.optim.AdamW(theirs, **options), theirs, 20)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_equals_adam_of_torch_where_decay_is_in_the_gradient():
    ours, theirs = parameters(), parameters()
    steps(FusedAdam(ours, adam_w_mode=False, **OPTIONS), ours, 10)
    steps(torch.optim.Adam(theirs, **OPTIONS), theirs, 10)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_step_is_counted_in_the_group():
    params = parameters()
    optimizer = FusedAdam(params, **OPTIONS)
    steps(optimizer, params, 3)
    assert optimizer.param_groups[0]["step"] == 3
    assert set(optimizer.state[params[0]]) == {"exp_avg", "exp_avg_sq"}


def test_continues_from_its_state_dict():
    whole, halves = parameters(), parameters()
    steps(FusedAdam(whole, **OPTIONS), whole, 6)
    first = FusedAdam(halves, **OPTIONS)
    steps(first, halves, 3)
    second = FusedAdam(halves, **OPTIONS)
    second.load_state_dict(first.state_dict())
    steps(second, halves, 3, first=3)
    for one, other in zip(whole, halves, strict=True):
        assert torch.equal(one, other)


def test_parameters_without_a_gradient_stay():
    params = parameters()
    before = [param.detach().clone() for param in params]
    optimizer = FusedAdam(params, **OPTIONS)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    assert torch.equal(params[2], before[2])


def test_torchs_compiler_is_not_imported_for_it():
    program = (
        "import sys, torch; from megapsft.platform.fused_adam import FusedAdam\n"
        "FusedAdam([torch.nn.Parameter(torch.ones(1))]); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
