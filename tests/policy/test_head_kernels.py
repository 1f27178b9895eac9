"""The head's Triton kernels without a GPU: run in Triton's interpreter, and compiled for A100, H200 and B200.

Triton reads TRITON_INTERPRET when it is imported, so the kernels run in a process of their own, one for all cases:
`python -m tests.policy.test_head_kernels interpret` prints, per case, [deviation, tolerance] of whatever it looked at. On a GPU:
tests/gpu/test_head.py.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch

from megapsft.policy.backend import failure
from megapsft.policy.head import statistics as plain
from megapsft.policy.head.statistics import Known, Wanted
from tests.policy.test_head_terms import TERMS, _shard, edges, exact, head, inputs, loss_of, textbook
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ROUNDING = {"fp32": 1e-5, "bf16": 2**-7, "fp16": 2**-10}  # one unit in the last place: the interpreter cuts bf16 off
CAPABILITIES = (80, 90, 100)  # A100, H100 and H200, B200
SLABS = (("bf16", True), ("fp32", False))  # dtype, and whether rows are aligned
SHARDS = (2501, 1, 2048, 45)  # of blocks of 2048 columns: one and a part, one word, one exactly, a small part


def blocks(term, dtype, widths=SHARDS, temperature=0.7, wanted=(0, 1, 2), offset=0.0, turned=False):
    """Statistics of shards of given widths, merged, and their gradients: as of statistics.py, and as of fp64 autograd."""
    from megapsft.policy.head import triton_kernels as kernels

    name, term, dtype = dtype, TERMS[term], DTYPES[dtype]
    starts, vocab = [sum(widths[:i]) for i in range(len(widths))], sum(widths)
    borders = [edge for start, width in zip(starts, widths, strict=True) for edge in (start, start + width - 1)]
    tokens = len(borders) + 3
    generator = torch.Generator().manual_seed(vocab)
    rising = torch.linspace(offset, offset + 12, vocab)  # the maximum moves from block to block
    raw, ref = ((torch.randn(tokens, vocab, generator=generator) * 3 + rising * slope).to(dtype) for slope in (1, 0.5))
    labels = torch.cat([torch.tensor(borders), torch.randint(vocab, (3,), generator=generator)])
    is_kl = term is not None and term.kind != "gem"
    target = raw.gather(1, labels[:, None])[:, 0].to(torch.float32) / temperature

    slabs = [_slab(raw[:, a : a + w], 3, turned) for a, w in zip(starts, widths, strict=True)]
    refs = [_slab(ref[:, a : a + w], 5, turned) if is_kl else None for a, w in zip(starts, widths, strict=True)]
    parts, expected_parts = [], []
    for start, slab, r in zip(starts, slabs, refs, strict=True):
        parts.append(kernels.statistics(slab, r, labels - start, target, term, temperature))
        z, r = (None if x is None else x.float() / temperature for x in (slab, r))
        expected_parts.append(plain.statistics(z, r, labels - start, target, term))
    found = {}
    for row, channel in enumerate(plain.channels(term)):
        pairs = [(ours[row], theirs[row]) for ours, theirs in zip(parts, expected_parts, strict=True)]
        found[f"statistics.py: {channel}"] = [max(_largest(a, b) for a, b in pairs), 3e-6]

    known, *outputs = plain.finish(plain.merge(torch.stack(parts), term), term)
    logits = raw.double().requires_grad_()
    identity = torch.eye(vocab, dtype=torch.float64)
    exact_outputs = textbook(logits, identity, ref.double(), identity, labels, term, temperature)
    for what, value, expected in zip(("logprobs", "entropy", "term"), outputs, exact_outputs, strict=False):
        found[what] = [_largest(value, expected.detach()), 5e-6]

    wanted = [i for i in wanted if i < len(exact_outputs)]
    loss = sum((_weights(tokens, i).double() * exact_outputs[i]).sum() for i in wanted)
    (expected,) = torch.autograd.grad(loss, logits)
    upstream = Wanted(*(_weights(tokens, i) / temperature if i in wanted else None for i in range(3)))
    for i, (start, slab, r) in enumerate(zip(starts, slabs, refs, strict=True)):
        done = kernels.gradient(slab, r, labels - start, known, upstream, term, temperature)
        found[f"place of shard {i}"] = [abs(done.data_ptr() - slab.data_ptr()), 0]
        found[f"writes beside shard {i}"] = [int((~slab._base.isnan()).sum()) - slab.numel(), 0]
    found["gradient"] = [_relative(torch.cat(slabs, 1), expected), ROUNDING[name]]
    return found


def _slab(values, beside, turned):
    """The values as a slice of a larger tensor, of rows (or columns) that are apart; what is beside them is nan."""
    if turned:
        return _slab(values.T, beside, False).T
    whole = values.new_full((values.shape[0], values.shape[1] + beside), torch.nan)
    whole[:, 1 : 1 + values.shape[1]] = values
    return whole[:, 1 : 1 + values.shape[1]]


def _weights(tokens, output):
    return torch.linspace(0.5, 1.5, tokens).roll(output)


def _largest(value, exact):
    return float((value.double() - exact.double()).abs().max() / exact.abs().max().clamp(min=1))


def _relative(value, exact):
    return float((value.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def whole_head(term, dtype, vocab, chunk_bytes, entropy_gradient=True, valid=None, temperature=0.8):
    """`vocab_parallel_logprobs` against fp64 autograd of the same operands; a pass without gradient has the same bits."""
    name, term, valid = dtype, TERMS[term], valid or vocab
    *operands, labels = inputs(9, vocab, DTYPES[dtype])
    labels = labels.clamp(max=valid - 1)
    hidden, weight, ref_hidden, ref_weight = (x.double() for x in operands)
    hidden.requires_grad_(), weight.requires_grad_()
    expected = list(textbook(hidden, weight[:valid], ref_hidden, ref_weight[:valid], labels, term, temperature))
    if not entropy_gradient:
        expected[1] = expected[1].detach()
    expected_grads = torch.autograd.grad(loss_of(expected), (hidden, weight))

    more = {"chunk_bytes": chunk_bytes, "entropy_gradient": entropy_gradient, "backend": "triton", "valid": valid}
    with torch.no_grad():
        old = head(*operands, labels, term, temperature, **more)
    hidden, weight = (x.clone().requires_grad_() for x in operands[:2])
    outputs = head(hidden, weight, *operands[2:], labels, term, temperature, **more)
    grads = torch.autograd.grad(loss_of(outputs), (hidden, weight))
    tolerance = {"fp64": 1e-12, "fp32": 2e-6, "bf16": 0.02}[name]
    return _against(outputs, grads, expected, expected_grads, tolerance) | {
        "bits without gradient": [sum(int((a != b).sum()) for a, b in zip(old, outputs, strict=True)), 0],
        "gradient in padding": [float(grads[1][valid:].abs().sum()), 0],
    }


def _against(outputs, grads, expected, expected_grads, tolerance):
    found = {}
    for what, value, exactly in zip(("logprobs", "entropy", "term"), outputs, expected, strict=False):
        found[what] = [_largest(value.detach(), exactly.detach()), tolerance]
    for what, grad, exactly in zip(("gradient in hidden", "gradient in weight"), grads, expected_grads, strict=True):
        found[what] = [_relative(grad, exactly), tolerance if tolerance > 1e-3 else tolerance * 5]
    return found


def real_shards(term, ranks, vocab, rows):
    """Tensor-parallel ranks over gloo: odd shards, and shards of nothing but padding."""
    results = run_ranks(ranks, _shard, TERMS[term], "triton", vocab, rows, torch.float32)
    outputs, whole = results[0][0], torch.cat([weight for _, _, weight in results])
    grads = sum(hidden for _, hidden, _ in results), whole[:vocab]
    return _against(outputs, grads, *exact(edges(vocab, rows // ranks, torch.float32), TERMS[term], 0.8), 2e-6) | {
        "bits of the ranks": [sum(int((a != b).sum()) for r in results for a, b in zip(r[0], outputs, strict=True)), 0],
        "gradient in padding": [float(whole[vocab:].abs().sum()), 0],
    }


def no_logits(tokens, columns):
    """Their statistics change nothing when merged; there is nothing to write."""
    from megapsft.policy.head import triton_kernels as kernels

    none, three = torch.empty(tokens, columns), torch.ones(tokens, 3)
    labels, known = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
    parts = torch.stack([kernels.statistics(z, None, labels - 3 * i, None, None) for i, z in enumerate((three, none))])
    done = kernels.gradient(none, None, labels, Known(known, known, known, known), Wanted(known, known, None), None)
    return {
        "merged": [int((plain.merge(parts, None) != parts[0]).sum()), 0],
        "gradient": [abs(done.numel()), 0],
    }


def as_on_a_gpu(term):
    """What tests/gpu/test_head.py does, at a small size: it fails by raising."""
    from tests.gpu import test_head as there

    there.DEVICE, there.VOCAB, there.PADDED, there.SLAB = "cpu", 101, 128, 4 * 40 * 64
    there.check((24, 40), torch.float32, TERMS[term], 0.6, 1e-4, lambda name, value: None)
    there.same_bits((24, 40), TERMS[term])
    there.test_kernels_on_the_same_logits(TERMS[term], torch.float32, 47)
    return {"raised": [0, 0]}


def far_apart(turned):
    """Logits whose offsets do not fit 32 bits, in a file that is all holes."""
    from megapsft.policy.head import triton_kernels as kernels

    with tempfile.NamedTemporaryFile() as file:
        whole = torch.from_file(file.name, shared=True, size=2**31 + 8, dtype=torch.bfloat16)
        slab = whole.as_strided((3, 3), (1, 2**30) if turned else (2**30, 1))
        values, labels = torch.arange(9.0).view(3, 3) / 4, torch.tensor([2, 1, 2])
        slab.copy_(values)
        stats = kernels.statistics(slab, None, labels, None, None)
        expected = plain.statistics(values.clone(), None, labels, None, None)
        known, *_ = plain.finish(stats, None)
        wanted = Wanted(torch.ones(3), None, None)
        kernels.gradient(slab, None, labels, known, wanted, None)
        plain.gradient(values, None, labels, known, wanted, None)
        return {"statistics": [_largest(stats, expected), 3e-6], "gradient": [_largest(slab, values), ROUNDING["bf16"]]}


def kept_and_read_twice(dtype):
    """The gradient lies where the kept logits were: a second backward pass is to be an error, not a gradient of gradients."""
    *operands, labels = inputs(9, 101, DTYPES[dtype])
    operands[0].requires_grad_()
    logprobs, _ = head(*operands, labels, None, chunk_bytes=10**9, entropy_gradient=False, backend="triton")
    logprobs.sum().backward(retain_graph=True)
    try:
        logprobs.sum().backward()
    except RuntimeError as error:
        return {"refused": [0 if "modified by an inplace operation" in str(error) else 1, 0]}
    return {"refused": [1, 0]}


def checked():
    """What is looked at before the kernels are used finds nothing wrong with them."""
    found = failure()
    return {str(found): [int(found is not None), 0]}


CASES = {f"shards {term} {dtype}": (blocks, term, dtype) for term in TERMS for dtype in ("fp32", "bf16")}
CASES |= {
    "shards fp16": (blocks, "none", "fp16"),
    "one word": (blocks, "none", "fp32", (1,)),
    "one block": (blocks, "none", "bf16", (2048,)),
    "shards of one": (blocks, "forward_kl", "fp32", (1, 1, 1)),
    "only the log-probability": (blocks, "none", "fp32", (2049, 7), 1.0, (0,)),
    "only the entropy": (blocks, "none", "fp32", (2049, 7), 1.0, (1,)),
    "all far below zero": (blocks, "none", "fp32", (2049, 7), 1.0, (0, 1), -90.0),
    "all far above zero": (blocks, "none", "fp32", (2049, 7), 1.0, (0, 1), 90.0),
}
CASES |= {f"all at five thousand {term}": (blocks, term, "fp32", (2049, 7), 1.0, (0, 1, 2), 5000.0) for term in TERMS}
CASES |= {f"only the term {term}": (blocks, term, "fp32", (61, 40), 1.3, (2,)) for term in TERMS if term != "none"}
CASES |= {f"columns apart {term}": (blocks, term, "fp32", (45, 50), 0.7, (0, 1, 2), 0.0, True) for term in TERMS}
CASES |= {"rows far apart": (far_apart, False), "columns far apart": (far_apart, True)}
for term in TERMS:
    CASES |= {f"head {term} {dtype}": (whole_head, term, dtype, 101, 4 * 9 * 64) for dtype in ("fp64", "fp32", "bf16")}
    CASES[f"head {term} padded, in one slab"] = (whole_head, term, "fp32", 128, 10**9, True, 101)
CASES |= {f"head that keeps its slab {dtype}": (whole_head, "none", dtype, 101, 10**9, False) for dtype in ("fp32", "bf16")}
CASES |= {f"head that kept its slab, again {dtype}": (kept_and_read_twice, dtype) for dtype in ("fp64", "fp32", "bf16")}
CASES |= {f"as on a GPU {term}": (as_on_a_gpu, term) for term in TERMS}
CASES["head by blocks and slabs"] = (whole_head, "forward_kl", "fp32", 5003, 4 * 9 * 2500)
CASES |= {f"ranks {term}": (real_shards, term, 2, 101, 128) for term in ("none", "gem logsigmoid")}
CASES["ranks of padding"] = (real_shards, "forward_kl", 4, 60, 256)
CASES["the check before they are used"] = (checked,)
CASES |= {f"no logits {shape}": (no_logits, *shape) for shape in ((0, 5), (4, 0), (0, 0))}


def interpret():
    """Every case; one that fails is told beside the others."""
    found = {}
    for case, (function, *arguments) in CASES.items():
        try:
            found[case] = function(*arguments)
        except Exception:
            found[case] = {traceback.format_exc(): [1, 0]}
    return found


def compile_all():
    """Of both kernels for every term, dtype and kind of GPU: loads of 128 bits in the PTX, and what ptxas gave them.

    `aligned`: rows that begin at multiples of 16 bytes, as slabs of a multiple of 64 columns have them.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from megapsft.policy.head import triton_kernels as kernels

    found = {}
    for capability, (name, term), (dtype, aligned) in itertools.product(CAPABILITIES, TERMS.items(), SLABS):
        types = dict.fromkeys(("stats", "known_top", "known_total", "mean", "target", "of_logprobs", "of_entropy"), "*fp32")
        types |= {"labels": "*i64", "part": f"*{dtype}"}
        types |= dict.fromkeys(("tokens", "columns", "row_stride", "ref_row_stride"), "i32")
        types |= dict.fromkeys(("scale", "sharpness"), "fp32") | ({"ref": f"*{dtype}"} if term is not None else {})
        of_a_term = ("known_target", "known_ref_top", "other_total", "level", "of_term")
        types |= dict.fromkeys(of_a_term, "*fp32") if term is not None else {}
        constants = {"column_stride": 1, "ref_column_stride": 1, "BLOCK": kernels.BLOCK} | kernels._switches(term)
        for kernel in (kernels._statistics, kernels._gradient):
            signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
            of_16 = [i for i, kind in enumerate(signature.values()) if kind.startswith("*") or (aligned and kind == "i32")]
            source = triton.compiler.ASTSource(
                kernel,
                signature,
                {argument: constants.get(argument) for argument, kind in signature.items() if kind == "constexpr"},
                {(i,): [["tt.divisibility", 16]] for i in of_16},
            )
            made = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": kernels.WARPS})
            wide = len(re.findall(r"ld\.global\S*\.v4", made.asm["ptx"]))
            case = f"sm_{capability}, {name}, {dtype}{', aligned' if aligned else ''}, {kernel.__name__}"
            found[case] = {"wide loads": wide, **resources(made.asm["cubin"])}
    return found


def resources(cubin):
    """Registers of a thread, its bytes of stack and local memory (spills), and bytes of shared memory, of the one kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def child(what, **environment):
    """What `python -m tests.policy.test_head_kernels` prints, in a process that sees `environment`."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.policy.test_head_kernels", what],
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted():
    return child("interpret", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case, interpreted):
    assert interpreted[case]
    assert {what: found for what, found in interpreted[case].items() if not found[0] <= found[1]} == {}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return child("compile", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


def test_every_kernel_compiles_for_every_gpu_and_nothing_spills(compiled):
    assert len(compiled) == len(CAPABILITIES) * len(TERMS) * len(SLABS) * 2
    for case, found in compiled.items():
        assert (found["STACK"], found["LOCAL"]) == (0, 0), f"{case} keeps something in local memory: {found}"
        assert 0 < found["REG"] <= 128, f"{case} leaves a multiprocessor fewer than two programs: {found}"
        assert found["SHARED"] <= 2048, case  # the reduction over a row's warps


def test_of_bf16_logits_each_is_read_once_in_loads_of_16_bytes(compiled):
    wide = {case: found["wide loads"] for case, found in compiled.items() if "bf16, aligned" in case}
    assert wide == {case: 2 if "_kl," in case else 1 for case in wide}
    assert len(wide) == len(CAPABILITIES) * len(TERMS) * 2


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
