"""The output weight's gradient under Megatron's data parallelism: summed over microbatches in fp32 whatever the model's dtype."""

from __future__ import annotations

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megapsft.config import ParallelConfig
from megapsft.parallel import ModelShape, initialize, plan_mesh, shutdown
from megapsft.policy.head import chunked
from megapsft.policy.vocab_parallel import vocab_parallel_logprobs
from tests.ranks import run_ranks

MICROBATCHES, T, D, VOCAB, ROWS = 6, 37, 24, 101, 128  # rows: of the padded vocabulary
SHAPE = ModelShape(num_layers=1, num_attention_heads=1, num_query_groups=1, ffn_hidden_size=4, num_experts=0)


class Model(torch.nn.Module):
    """A mixing layer between an embedding and the head, which may be tied."""

    def __init__(self, dtype: torch.dtype, tied: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"mix": (D, D), "output": (ROWS, D)} | ({} if tied else {"embedding": (ROWS, D)})
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.3).to(dtype)))
        self.tied = tied
        if tied:
            self.output.zero_out_wgrad = True  # as GPTModel has it where both are on one pipeline stage

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(tokens, self.output if self.tied else self.embedding) @ self.mix

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logprobs, _ = vocab_parallel_logprobs(
            self.hidden(tokens), self.output, labels, None, VOCAB, 4 * T * 40, entropy_gradient=False
        )
        return logprobs.sum()


def microbatches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (2, T), generator=generator) for _ in range(MICROBATCHES)]


def accumulated(dtype: torch.dtype, tied: bool, overlap: bool, tokens_at_once: int = chunked.MOST_TOKENS) -> list[torch.Tensor]:
    """`main_grad` of the output weight after the microbatches of each of two updates, through the real wrapper."""
    chunked.MOST_TOKENS = tokens_at_once  # of this process, which is a rank
    initialize(plan_mesh(ParallelConfig(), 1, SHAPE, False), ParallelConfig(), seed=1)
    config = TransformerConfig(num_layers=1, hidden_size=D, num_attention_heads=1, bf16=dtype is torch.bfloat16)
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    model = DistributedDataParallel(config, options, Model(dtype, tied))
    found = []
    for _ in range(2):
        model.zero_grad_buffer()
        *first, last = microbatches()
        with model.no_sync():
            for tokens, labels in first:
                model(tokens, labels).backward()
        model(*last).backward()
        model.finish_grad_sync()
        found.append(model.module.output.main_grad.clone())
    shutdown()
    return found


def exactly(dtype: torch.dtype, tied: bool) -> torch.Tensor:
    """The sum in fp64 of the same parameters' gradient."""
    model, total = Model(dtype, tied).double(), torch.zeros(ROWS, D, dtype=torch.float64)
    for tokens, labels in microbatches():
        hidden = model.hidden(tokens)
        hidden = hidden + (hidden.to(dtype).double() - hidden).detach()  # as the product leaves it
        log_p = torch.log_softmax(hidden @ model.output[:VOCAB].T, -1)
        total += torch.autograd.grad(log_p.gather(1, labels[:, None]).sum(), model.output)[0]
    return total


def rounded_each(dtype: torch.dtype) -> torch.Tensor:
    """The sum of what autograd alone gives, each microbatch in the dtype of the weight."""
    model = Model(dtype, tied=False)
    return sum(torch.autograd.grad(model(*one), model.output)[0].double() for one in microbatches())


def error(gradient: torch.Tensor, exact: torch.Tensor) -> float:
    return float((gradient.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_in_fp32_it_is_the_gradient(tied, overlap):
    """Once: neither left out nor counted again by the hook; in the next update as in the first, and none in the padding."""
    ((first, second),) = run_ranks(1, accumulated, torch.float32, tied, overlap)
    assert torch.equal(first, second)
    assert error(first, exactly(torch.float32, tied)) < 1e-6
    if not tied:
        assert first[VOCAB:].abs().max() == 0


@pytest.mark.parametrize("tokens_at_once", [chunked.MOST_TOKENS, 16])
def test_in_bf16_no_microbatch_rounds_what_it_adds(tokens_at_once):
    """What is left is the rounding of the logits and of their gradients."""
    ((gradient, _),) = run_ranks(1, accumulated, torch.bfloat16, False, False, tokens_at_once)
    exact = exactly(torch.bfloat16, False)
    assert gradient.dtype == torch.float32
    assert error(gradient, exact) < 0.75 * error(rounded_each(torch.bfloat16), exact)
