"""The balance loss and routing replay, on real ranks: gradients of every split against one rank, and against plain autograd.

Not tested here: Transformer Engine's layers (tests/gpu), experts chosen in groups.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from megapsft.checkpoint.hf import export_stream, import_hf, read_config
from megapsft.checkpoint.random_init import init_model
from megapsft.config import load_config
from megapsft.data.pack import Layout, pack
from megapsft.models.families import family_of
from megapsft.models.router import BalanceLoss, routed
from megapsft.parallel import initialize, plan_mesh, shutdown
from megapsft.policy.build import Policy, build_chunks, distribute, model_shape, transformer_config
from megapsft.policy.constants import without_routing
from megapsft.policy.forward import evaluate, forward_backward
from megapsft.policy.routing import cut_routing, join_routing
from megapsft.types import Sample
from tests.invariants.splits import split
from tests.ranks import run_ranks

TOLERANCE = 1e-5  # relative, of every tensor
COEFF = 0.3
EXPERTS, TOP = 8, 2
ONE_RANK = split("1 rank", packing=False, mbs=1)
SPLITS = (
    split("microbatches of 2", packing=False, mbs=2),
    split("packed", pack=256),
    split("recompute full", packing=False, mbs=2, recompute="full"),
    split("recompute moe", pack=256, recompute="selective", modules="[moe]"),
    split("tp2+sp", 2, pack=256, tp=2, sp=True),
    split("tp2+sp unpacked", 2, packing=False, mbs=2, tp=2, sp=True),
    split("tp2+sp recompute full", 2, pack=256, tp=2, sp=True, recompute="full"),
    split("cp2", 2, pack=256, cp=2),
    split("cp2 unpacked recompute full", 2, packing=False, mbs=2, cp=2, recompute="full"),
    split("pp2 recompute full", 2, pack=256, pp=2, recompute="full"),
    split("pp2+vpp2", 2, pack=256, pp=2, vpp=2),
    split("pp2+vpp2 recompute full", 2, packing=False, mbs=2, pp=2, vpp=2, recompute="full"),
    split("dp2", 2, pack=256),
    split("ep2", 2, pack=256, ep=2),
    split("tp2+ep2+etp1", 2, pack=256, tp=2, ep=2, etp=1),
    split("tp2+cp2+sp recompute moe", 4, pack=256, tp=2, cp=2, sp=True, recompute="selective", modules="[moe]"),
)


@pytest.fixture(scope="module")
def models(tiny_data, tmp_path_factory):
    """Folders of a model whose routing matters, and of one some updates away from it, which chooses other experts."""
    folders = [tmp_path_factory.mktemp("router") / name for name in ("old", "new")]
    for number, folder in enumerate(folders):
        init_model(family="qwen3_moe", data_path=tiny_data, out_dir=folder, vocab_size=307, hidden_size=64, intermediate_size=128,
                   num_experts=EXPERTS, num_experts_per_tok=TOP, seed=1)  # fmt: skip
        generator = torch.Generator().manual_seed(3)
        weights = {
            name: w if w.dim() == 1 else 4 * w + number * 0.01 * torch.randn(w.shape, generator=generator)
            for name, w in load_file(folder / "model.safetensors").items()
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folders


@pytest.fixture(scope="module")
def one_rank(models):
    return run_ranks(1, measure, *models, ONE_RANK.options)[0]


@pytest.mark.parametrize("case", SPLITS, ids=lambda case: case.name)
def test_a_split_changes_nothing(case, one_rank, models):
    ours = run_ranks(case.world, measure, *models, case.options)
    for pass_ in ("balanced", "replayed"):
        agree(ours[0][pass_]["gradient"], one_rank[pass_]["gradient"])
        assert ours[0][pass_]["loss"] == pytest.approx(one_rank[pass_]["loss"], rel=1e-6)
        assert ours[0][pass_]["balance"] == pytest.approx(one_rank[pass_]["balance"], rel=1e-6)
    flips, chosen = (sum(rank[key] for rank in ours) for key in ("flips", "choices"))
    assert flips > 0.01 * chosen, "with these weights the experts are others"
    for rank in ours:
        assert rank["replay errors"] == 0
        assert rank["same bits"], "replay with unchanged weights"
        assert rank["unfinished"] == 0


def test_the_loss_matters(one_rank):
    """Or else agreement would say nothing: without it, and without replay, gradients are others by far."""
    plain, balanced, replayed = (one_rank[key]["gradient"] for key in ("plain", "balanced", "replayed"))
    routers = [name for name in plain if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    for name in routers:
        assert distance(balanced[name], plain[name]) > 0.1
        assert distance(replayed[name], balanced[name]) > 0.1


def test_gradient_and_value_are_those_of_the_formula(one_rank, models):
    """Nothing is trained but the balance: plain autograd of the formula over whole samples; the mask has no say in it."""
    alone, few, value, expected = run_ranks(1, formula, models[1])[0]
    agree(alone, {name: g for name, g in expected.items() if g.norm() > 0}, absent_is_zero=True)
    assert value == pytest.approx(one_rank["balanced"]["balance"], rel=1e-6)
    agree(few, alone, tolerance=1e-4)  # a difference of two gradients


def test_routing_of_joined_microbatches_is_cut_and_joined(models):
    """Passes without gradient may take several microbatches at once: what they record is what each records alone."""
    for case in (split("", pack=256), split("", 2, pack=256, tp=2, sp=True), split("", 2, pack=256, cp=2)):
        for together, alone, joined, cut_again, several in run_ranks(case.world, joint, models[0], case.options):
            assert several > 1
            for ours, expected in zip(cut_again, alone, strict=True):
                assert all(torch.equal(ours[layer], expected[layer]) for layer in expected)
            assert together.keys() == joined.keys()
            assert all(torch.equal(together[layer], joined[layer]) for layer in joined)


@pytest.fixture(scope="module")
def chosen(models):
    """What is chosen on one rank without replay, by sample as an engine gives it; and log-probabilities, loss and gradient."""
    return run_ranks(1, choose, models[1])[0]


@pytest.mark.parametrize("case", [ONE_RANK, *SPLITS], ids=lambda case: case.name)
def test_what_the_engine_chose_is_chosen_again_on_every_split(case, chosen, models):
    """The engine's choices here: any experts, and none for some samples; and the policy's own, which change nothing."""
    ours = run_ranks(case.world, replay, models[1], case.options, chosen["random"], chosen["own"])
    agree(ours[0]["random"]["gradient"], chosen["of random"]["gradient"])
    assert ours[0]["random"]["loss"] == pytest.approx(chosen["of random"]["loss"], rel=1e-6)
    assert ours[0]["random"]["balance"] == pytest.approx(chosen["of random"]["balance"], rel=1e-6)
    agree(ours[0]["own"]["gradient"], chosen["free"]["gradient"])
    for rank in ours:
        assert rank["same bits"], "replay of what is chosen anyway"
        assert rank["merged"], "several packs as one, without gradient"
        assert rank["unfinished"] == 0


def test_what_the_engine_chose_matters(chosen):
    for name in [name for name in chosen["free"]["gradient"] if name.endswith("mlp.gate.weight")]:
        assert distance(chosen["of random"]["gradient"][name], chosen["free"]["gradient"][name]) > 0.1


def test_more_than_256_experts_are_sent_whole():
    for cut, expected in run_ranks(2, wide):
        assert all(torch.equal(ours[5], theirs) for ours, theirs in zip(cut, expected, strict=True))


def wide():
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    parts = [torch.randint(0, 512, (n, 3), generator=torch.Generator().manual_seed(n)).to(torch.int16) for n in (4, 8)]
    cut = cut_routing({5: torch.cat(parts).chunk(2)[rank]}, [4, 8], group)
    dist.destroy_process_group()
    return cut, [part.chunk(2)[rank] for part in parts]


def measure(old, new, options):
    """On a rank: losses and gradients with the balance loss, with replay, and without both; and what replay chose."""
    policy, minibatch = start(new, options)
    result = {}
    result["plain"] = train(policy, minibatch, coeff=0.0)
    result["balanced"] = train(policy, minibatch, coeff=COEFF)
    present = record(policy, minibatch)
    plain = [output[..., 0] for output in evaluate(policy, minibatch)]
    with routing(policy, carrying(minibatch, present)):
        again = [output[..., 0] for output in evaluate(policy, minibatch)]
    result["same bits"] = all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    import_hf(policy.gpt_models(), old, policy.hf)
    recorded = record(policy, minibatch)
    import_hf(policy.gpt_models(), new, policy.hf)
    differ = [(a[layer] != b[layer]).sum().item() for a, b in zip(recorded, present, strict=True) for layer in a]
    result["flips"], result["choices"] = sum(differ), sum(a[layer].numel() for a in recorded for layer in a)
    with maps(policy) as seen:
        result["replayed"] = train(policy, carrying(minibatch, recorded), coeff=COEFF)
    result["replay errors"] = wrongly_replayed(seen, recorded)
    result["unfinished"] = sum(len(layer.mlp.router.unfinished) for layer in layers(policy))
    shutdown()
    return result


def choose(model):
    """On one rank: random choices of an engine, the router's own, and what is trained with the first and without any."""
    policy, minibatch = start(model, ONE_RANK.options)
    result, own = {"free": train(policy, minibatch, COEFF)}, []
    for chosen in record(policy, minibatch):  # a microbatch is a sample
        experts = torch.stack([chosen[layer] for layer in sorted(chosen)], 1).numpy().astype(np.int16)
        experts[-1] = -1  # no engine reads the last token
        own.append(experts)
    random = np.random.default_rng(7)
    arbitrary = [random.random((*one.shape[:2], EXPERTS)).argsort(-1)[..., :TOP].astype(np.int16) for one in own]
    for experts in arbitrary:
        experts[-1] = -1
    arbitrary[2] = arbitrary[5] = None  # demonstrations
    minibatch = update_of(policy, ONE_RANK.options, arbitrary)
    result |= {"own": own, "random": arbitrary, "of random": train(policy, minibatch, COEFF)}
    shutdown()
    return result


def replay(model, options, arbitrary, own):
    """On a rank: what is trained with choices of an engine."""
    policy, _ = start(model, options)
    minibatch = update_of(policy, options, arbitrary)
    result = {"random": train(policy, minibatch, COEFF)}
    alone, together = (evaluate(policy, minibatch, at_once=size) for size in (1, 4))
    result["merged"] = all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(alone, together, strict=True))
    minibatch = update_of(policy, options, own)
    result["own"] = train(policy, minibatch, COEFF)
    passes = [evaluate(policy, one) for one in (minibatch, without_routing(minibatch))]
    result["same bits"] = all(torch.equal(a, b) for a, b in zip(*passes, strict=True))
    result["unfinished"] = sum(len(layer.mlp.router.unfinished) for layer in layers(policy))
    shutdown()
    return result


def start(model, options):
    """The policy of a folder on this rank, and its part of an update of 8 random samples."""
    config = load_config(None, [f"model.path={model}", "model.dtype=float32", "model.make_vocab_size_divisible_by=16", *options])
    hf, parallel, world = read_config(model), config.parallel, int(os.environ["WORLD_SIZE"])
    family = family_of(hf)
    mesh = plan_mesh(parallel, world, model_shape(hf), torch.cuda.is_available(), config.model.moe_token_dispatcher_type)
    initialize(mesh, parallel, seed=1)
    megatron = transformer_config(family, hf, config.model, parallel, mesh)
    chunks = build_chunks(megatron, hf, config.model, mesh)
    import_hf(chunks, model, hf)
    policy = Policy(chunks=distribute(chunks, megatron, parallel), config=megatron, family=family, hf=hf, source=model, mesh=mesh)
    return policy, update_of(policy, options)


def update_of(policy, options, routed=None):
    """This rank's part of an update of 8 random samples, with what an engine chose for each or without."""
    data, mesh = load_config(None, options).data, policy.mesh
    layout = Layout(
        packing=data.packing,
        pack_length=data.pack_length,
        micro_batch_size=data.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=mesh.dp,
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=mesh.cp,
        tensor_parallel_size=mesh.tp,
        sequence_parallel=mesh.sequence_parallel,
        microbatch_multiple=mesh.pp if mesh.vpp > 1 else 1,
        equal_lengths=mesh.pp > 1,
    )
    random = np.random.default_rng(5)
    samples = [
        Sample(
            token_ids=random.integers(0, policy.hf.vocab_size, n, dtype=np.int32),
            loss_mask=random.random(n) < 0.5,
            source=f"sample {i}",
        )
        for i, n in enumerate(random.integers(20, 150, 8))
    ]
    if routed is not None:
        samples = [dataclasses.replace(s, routed_experts=experts) for s, experts in zip(samples, routed, strict=True)]
    groups = [(sample,) for sample in samples]
    (minibatch,) = pack(groups, minibatch_size=len(groups), layout=layout, aggregation="token-mean", pad_token_id=0).minibatches
    return minibatch


def train(policy, minibatch, coeff):
    """Loss, balance loss and whole gradient of SFT plus the balance loss, over all ranks."""
    balance = BalanceLoss(coeff, minibatch.forward_tokens, policy.device) if coeff else None

    def sft(output, microbatch):
        loss = -torch.where(microbatch.loss_mask, microbatch.loss_weights * output[..., 0], 0.0).sum()
        return loss, loss.detach().double()

    with routing(policy, minibatch, balance=balance):
        losses = forward_backward(policy, minibatch, sft)
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    loss = sum(losses if first else (), torch.zeros((), dtype=torch.float64))
    value = balance.value if balance else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(loss)
    dist.all_reduce(value)
    return {"loss": loss.item(), "balance": value.item(), "gradient": whole_gradient(policy)}


@torch.no_grad()
def whole_gradient(policy):
    """What `main_grad` holds on all ranks, as whole tensors by their Hugging Face names; empty but on rank 0."""
    weights = [(p, p.data) for chunk in policy.chunks for p in chunk.parameters()]
    for p, _ in weights:
        p.data = p.main_grad.clone()
    gradient = {name: tensor.clone() for name, tensor in export_stream(policy.gpt_models(), policy.hf) if tensor is not None}
    for p, data in weights:
        p.data = data
    return gradient


def record(policy, minibatch):
    """What this rank's routers choose, by microbatch."""
    records = [{} for _ in minibatch.microbatches]
    with routing(policy, minibatch, records=records):
        evaluate(policy, minibatch)
    return records


@contextmanager
def routing(policy, minibatch, balance=None, records=None):
    """`routed` around each forward pass of the schedule; a stage meets the microbatches in order."""
    records = records or [None] * len(minibatch.microbatches)
    for gpt in policy.gpt_models():
        gpt.forward = _in_turn(gpt, deque(zip(minibatch.microbatches, records, strict=True)), balance)
    yield
    for gpt in policy.gpt_models():
        del gpt.forward


def _in_turn(gpt, turns, balance):
    forward = gpt.forward

    def inner(*args, **kwargs):
        microbatch, record = turns.popleft()
        with routed(gpt, microbatch, balance=balance, record=record):
            return forward(*args, **kwargs)

    return inner


def carrying(minibatch, routings):
    pairs = zip(minibatch.microbatches, routings, strict=True)
    return dataclasses.replace(minibatch, microbatches=tuple(dataclasses.replace(m, routing=r) for m, r in pairs))


def layers(policy):
    return [layer for gpt in policy.gpt_models() for layer in gpt.decoder.layers]


@contextmanager
def maps(policy):
    """Every [tokens, E] map that a router gives, as MoE layer -> list, recomputations included."""
    seen = {layer.layer_number: [] for layer in layers(policy)}
    hooks = [
        layer.mlp.router.register_forward_hook(lambda module, _, out: seen[module.layer_number].append(out[1].clone()))
        for layer in layers(policy)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def wrongly_replayed(seen, recorded):
    """Number of maps that differ from what was recorded; all of them where a router was asked too seldom."""
    wrong = 0
    for layer, found in seen.items():
        expected = [torch.zeros(len(r[layer]), EXPERTS, dtype=torch.bool).scatter(1, r[layer].long(), True) for r in recorded]
        rounds = len(found) // len(expected)
        wrong += rounds * len(expected) != len(found) or rounds == 0
        times = [sum(map_.shape == e.shape and torch.equal(map_, e) for map_ in found) for e in expected]
        wrong += sum(n < rounds for n in times)
    return wrong


def formula(model):
    """Gradients of the balance loss alone, of it beside a few trained tokens, its value, and plain autograd's."""
    policy, minibatch = start(model, ONE_RANK.options)

    def trained(keep):
        masks = [m.loss_mask & (torch.arange(m.loss_mask.shape[1]) % 97 < keep) for m in minibatch.microbatches]
        pairs = zip(minibatch.microbatches, masks, strict=True)
        return dataclasses.replace(minibatch, microbatches=tuple(dataclasses.replace(m, loss_mask=k) for m, k in pairs))

    alone = train(policy, trained(0), COEFF)
    assert alone["loss"] == 0
    few, without = train(policy, trained(3), COEFF), train(policy, trained(3), 0.0)
    assert few["loss"] > 0
    difference = {name: g - without["gradient"][name] for name, g in few["gradient"].items()}

    (gpt,), total = policy.gpt_models(), 0.0
    gpt.post_process = False  # the experts' logits are wanted, not the vocabulary's
    for m in minibatch.microbatches:
        real = int((m.sample_ids >= 0).sum())
        for z in logits(policy, lambda m=m, real=real: gpt(m.token_ids[:, :real], m.position_ids[:, :real], None)):
            p = torch.softmax(z[:, 0], -1)
            chosen = torch.nn.functional.one_hot(p.topk(TOP).indices, EXPERTS).sum((0, 1))
            total = total + COEFF / minibatch.samples * (EXPERTS / (TOP * real) * chosen * p.mean(0)).sum()
    parameters = list(policy.chunks[0].parameters())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.main_grad.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    expected = whole_gradient(policy)
    assert abs(alone["balance"] - total.item()) < 1e-6 * alone["balance"]
    shutdown()
    return alone["gradient"], difference, alone["balance"], expected


def logits(policy, forward):
    """[S, B, E] with gradient, of every router, of one pass."""
    seen = []
    for layer in layers(policy):
        router, gating = layer.mlp.router, type(layer.mlp.router).gating
        router.gating = lambda x, router=router, gating=gating: seen.append(gating(router, x)) or seen[-1]
    forward()
    for layer in layers(policy):
        del layer.mlp.router.gating
    return seen


def joint(model, options):
    """Recorded at once and alone; alone and joined; at once and cut; how many microbatches."""
    policy, minibatch = start(model, options)
    several = minibatch.microbatches
    lengths = [m.token_ids.shape[1] for m in several]
    ends = [int(m.cu_seqlens[-1]) for m in several]
    shifted = [m.cu_seqlens[1:] + sum(ends[:i]) for i, m in enumerate(several)]
    fields = [f.name for f in dataclasses.fields(several[0]) if isinstance(getattr(several[0], f.name), torch.Tensor)]
    whole = dataclasses.replace(
        several[0],
        **{name: torch.cat([getattr(m, name) for m in several], dim=1) for name in fields if name != "cu_seqlens"},
        cu_seqlens=torch.cat([several[0].cu_seqlens[:1], *shifted]).int(),
        max_seqlen=max(m.max_seqlen for m in several),
    )
    group = parallel_state.get_tensor_model_parallel_group() if policy.config.sequence_parallel else None
    (together,) = record(policy, dataclasses.replace(minibatch, microbatches=(whole,)))
    alone = record(policy, minibatch)
    result = together, alone, join_routing(alone, group), cut_routing(together, lengths, group), len(several)
    shutdown()
    return result


def distance(ours, expected):
    return float((ours - expected).double().norm() / expected.double().norm())


def agree(ours, expected, tolerance=TOLERANCE, absent_is_zero=False):
    if absent_is_zero:
        assert all(g.abs().max() == 0 for name, g in ours.items() if name not in expected)
    else:
        assert ours.keys() == expected.keys()
    worst = max(expected, key=lambda name: distance(ours[name], expected[name]))
    assert distance(ours[worst], expected[worst]) <= tolerance, (worst, distance(ours[worst], expected[worst]))
