"""The head's Triton kernels at the widths of Qwen3: against fp64, again for the same bits, and within their memory."""

from __future__ import annotations

import pytest
import torch

from megapsft.policy.backend import choose_backend, failure
from megapsft.policy.head import statistics as plain
from megapsft.policy.head.statistics import Known, Wanted
from tests.policy.test_head_terms import TERMS, head, loss_of, textbook

VOCAB, PADDED = 151_936, 152_064
SIZES = [(hidden, tokens) for hidden in (2048, 4096) for tokens in (8192, 16_384, 32_768)]
SMALLEST = SIZES[0]
SLAB = 2**30  # bytes of fp32 logits, half of that in bf16
EXACTLY = 24  # tokens, the first and the last among them, whose fp64 logits are made
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _memory_of_its_own():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def operands(size, dtype=torch.bfloat16):
    """hidden, weight, ref_hidden, ref_weight, labels; logits of about 1.5, padded rows that would win if they counted."""
    width, tokens = size
    generator = torch.Generator(DEVICE).manual_seed(tokens)

    def normal(rows, scale):
        return (torch.randn(rows, width, generator=generator, device=DEVICE) * scale).to(dtype)

    hidden, ref_hidden = normal(tokens, 1.0), normal(tokens, 1.0)
    weight, ref_weight = (normal(PADDED, 1.5 / width**0.5) for _ in range(2))
    weight[VOCAB:] = 1
    labels = torch.randint(VOCAB, (tokens,), generator=generator, device=DEVICE)
    labels[0], labels[-1] = 0, VOCAB - 1
    return hidden, weight, ref_hidden, ref_weight, labels


def some(tokens):
    return torch.linspace(0, tokens - 1, EXACTLY, device=DEVICE).long()


def trained(numbers, term, temperature, backend="triton", **more):
    """Outputs of all tokens, and gradients of a loss of some of them."""
    hidden, weight = (x.clone().requires_grad_() for x in numbers[:2])
    rows = some(len(hidden))
    outputs = head(hidden, weight, *numbers[2:], term, temperature, chunk_bytes=SLAB, valid=VOCAB, backend=backend, **more)
    grads = torch.autograd.grad(loss_of([x[rows] for x in outputs]), (hidden, weight))
    return [x.detach() for x in outputs], grads


def relative(value, exact):
    return float((value.double() - exact).norm() / exact.norm())


def test_auto_is_triton_whose_kernels_run():
    assert choose_backend("auto") == choose_backend("triton") == ("triton", "CUDA and Triton are here")
    assert failure() is None


def check(size, dtype, term, temperature, tolerance, record_property):
    """Values and gradients of sampled tokens against fp64; of the others nothing, and nothing of padded rows."""
    numbers = operands(size, dtype)
    outputs, (grad_hidden, grad_weight) = trained(numbers, term, temperature)
    rows = some(size[1])
    hidden, ref_hidden = (numbers[i][rows].double() for i in (0, 2))
    weight, ref_weight = (numbers[i][:VOCAB].double() for i in (1, 3))
    hidden.requires_grad_(), weight.requires_grad_()
    expected = textbook(hidden, weight, ref_hidden, ref_weight, numbers[4][rows], term, temperature)
    expected_grads = torch.autograd.grad(loss_of(expected), (hidden, weight))
    pairs = zip(("logprobs", "entropy", "term"), outputs, expected, strict=False)
    errors = {name: float((value[rows].double() - exact.detach()).abs().max()) for name, value, exact in pairs}
    errors["gradient of hidden"] = relative(grad_hidden[rows], expected_grads[0])
    errors["gradient of weight"] = relative(grad_weight[:VOCAB], expected_grads[1])
    record_property("errors", errors)
    for value, exact in zip(outputs, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value[rows].double(), exact.detach(), rtol=tolerance, atol=tolerance)
    assert errors["gradient of hidden"] < tolerance
    assert errors["gradient of weight"] < tolerance
    assert grad_weight[VOCAB:].abs().max() == 0
    untrained = torch.ones(size[1], dtype=torch.bool, device=DEVICE).index_fill(0, rows, False)
    assert grad_hidden[untrained].abs().max() == 0


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients_at_every_size(size, record_property):
    check(size, torch.bfloat16, None, 1.0, 0.03, record_property)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float32, 1e-4)], ids=["bf16", "fp32"])
def test_values_and_gradients_of_every_term(dtype, tolerance, term, temperature, record_property):
    """In bf16 the logits are what is inexact, and the labels' rows most of the gradient; fp32 tells of all the rest."""
    check(SMALLEST, dtype, term, temperature, tolerance, record_property)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_the_same_bits_again_and_without_gradient(term):
    same_bits(SMALLEST, term)


@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_the_same_bits_again_at_every_size(size):
    same_bits(size, None)


def same_bits(size, term):
    numbers = operands(size)
    outputs, grads = trained(numbers, term, 1.0)
    again, grads_again = trained(numbers, term, 1.0)
    with torch.no_grad():
        old = head(*numbers, term, chunk_bytes=SLAB, valid=VOCAB, backend="triton")
    for a, b in zip((*outputs, *grads, *outputs), (*again, *grads_again, *old), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("columns", [1, 47, 2048, 2049, 19_072, VOCAB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_kernels_on_the_same_logits(term, dtype, columns):
    """Logits given, not made: fp32 arithmetic against fp64. Rows lie apart, nan between them; labels in the block's tail too."""
    from megapsft.policy.head import triton_kernels as kernels

    generator = torch.Generator(DEVICE).manual_seed(columns)
    tokens, temperature = 33, 0.7

    def slab():
        whole = torch.full((tokens, columns + 9), torch.nan, device=DEVICE, dtype=dtype)
        whole[:, 3 : 3 + columns] = torch.randn(tokens, columns, generator=generator, device=DEVICE) * 3
        return whole[:, 3 : 3 + columns]

    z, ref = slab(), slab() if term is not None and term.kind != "gem" else None
    labels = torch.randint(columns, (tokens,), generator=generator, device=DEVICE)
    labels[:4] = torch.tensor([0, columns - 1, columns, -1], device=DEVICE)
    target = torch.randn(tokens, generator=generator, device=DEVICE)
    exact_z, exact_ref = (None if x is None else x.double() / temperature for x in (z, ref))

    stats = kernels.statistics(z, ref, labels, target, term, temperature)
    expected = plain.statistics(exact_z.clone(), None if ref is None else exact_ref.clone(), labels, target.double(), term)
    for found, exact in zip(stats, expected, strict=True):
        assert float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1)) < 1e-5

    known, *_ = plain.finish(expected, term)
    wanted = [torch.rand(tokens, generator=generator, device=DEVICE) + 0.5 for _ in range(2 if term is None else 3)]
    wanted += [None] * (3 - len(wanted))
    in_fp64 = Wanted(*(None if w is None else w.double() for w in wanted))
    expected = plain.gradient(exact_z, exact_ref, labels, known, in_fp64, term)
    in_fp32 = Known(*(None if k is None else k.float() for k in known.tensors()))
    found = kernels.gradient(z, ref, labels, in_fp32, Wanted(*wanted), term, temperature)
    assert found.data_ptr() == z.data_ptr()
    assert int((~z._base.isnan()).sum()) == z.numel()
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert float((found.double() - expected).norm() / expected.norm().clamp(min=1e-3)) < rounding


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("term", [None, TERMS["forward_kl"]], ids=["none", "forward_kl"])
def test_peak_memory(term, size, record_property):
    """Beside the gradients that any head must return: a slab (of a reference another), and the gradient of hidden in fp32."""
    width, tokens = size
    numbers = operands(size)
    trained(numbers, term, 1.0)  # compiles, and makes the libraries' workspaces
    torch.cuda.empty_cache()
    hidden, weight = (x.clone().requires_grad_() for x in numbers[:2])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = head(hidden, weight, *numbers[2:], term, chunk_bytes=SLAB, valid=VOCAB, backend="triton")
    grads = torch.autograd.grad(loss_of(outputs), (hidden, weight))
    torch.cuda.synchronize()
    beside = torch.cuda.max_memory_allocated() - before - sum(grad.nbytes for grad in grads)
    bound = SLAB // 2 * (2 if term is not None else 1) + tokens * width * 4
    record_property("memory", {"bytes": beside, "slabs and fp32 gradient of hidden": bound})
    assert beside <= bound * 1.1
