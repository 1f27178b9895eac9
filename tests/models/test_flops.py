"""FLOP of training by hand, and beside what others say of the same models: TFLOP/s over tokens/s of a GPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megapsft.checkpoint.hf import read_config
from megapsft.cluster.estimate import estimate
from megapsft.cluster.hardware import Machines
from megapsft.config import load_config
from megapsft.data.pack import Layout, pack
from megapsft.models.families import parameter_count
from megapsft.models.flops import active_per_token, model_flops
from megapsft.platform.chips import GPUS
from megapsft.types import Sample
from tests.shipped import FOLDER

MOE, SMALL = (read_config(FOLDER / "models" / name) for name in ("Qwen3-30B-A3B-Instruct-2507", "Qwen3-4B-Base"))
DENSE = dataclasses.replace(SMALL, hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False)  # Qwen3-8B
VOCABULARY = 151936


def by_token(hf, length):
    return model_flops(hf, length, length**2) / length


def test_qwen3_8b_by_hand():
    attention = 2 * 4096 * 32 * 128 + 2 * 4096 * 8 * 128  # query and output, key and value
    layer = attention + 3 * 4096 * 12288
    assert active_per_token(DENSE) == (layer, 0)
    weights = 36 * layer + VOCABULARY * 4096
    assert parameter_count(DENSE) == weights + VOCABULARY * 4096 + 36 * (2 * 4096 + 2 * 128) + 4096  # the embedding, norms
    assert model_flops(DENSE, 1, 0) == 6 * weights
    assert by_token(DENSE, 4096) == 6 * weights + 12 * 36 * 32 * 128 * 4096 / 2


def test_qwen3_30b_a3b_by_hand():
    attention = 2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128
    dense, experts = attention + 2048 * 128, 8 * 3 * 2048 * 768  # with the router; 8 experts of 128
    assert active_per_token(MOE) == (dense, experts)
    assert by_token(MOE, 4096) == 6 * (48 * (dense + experts) + VOCABULARY * 2048) + 12 * 48 * 32 * 128 * 4096 / 2


@pytest.mark.parametrize(
    ("hf", "tflops", "tokens"),  # a second and GPU, samples of 4096 tokens: the performance cards of Megatron-Bridge
    [(DENSE, 512.7, 10456), (MOE, 299.4, 13011)],
    ids=["Qwen3-8B", "Qwen3-30B-A3B"],
)
def test_published_runs_count_the_same(hf, tflops, tokens):
    assert by_token(hf, 4096) == pytest.approx(tflops * 1e12 / tokens, rel=0.005)  # those leave the router out: 0.3 %


def test_attention_sees_samples_and_not_packs():
    halves = 2 * model_flops(DENSE, 2048, 2048**2)
    assert model_flops(DENSE, 4096, 2 * 2048**2) == halves
    assert model_flops(DENSE, 4096, 4096**2) - halves == 12 * 36 * 32 * 128 * (4096**2 - 2 * 2048**2) / 2


def test_tied_embeddings_are_multiplied_with_once():
    assert SMALL.tie_word_embeddings
    assert model_flops(SMALL, 1, 0) == 6 * (36 * active_per_token(SMALL)[0] + VOCABULARY * 2560)
    assert model_flops(SMALL, 1, 0) - model_flops(SMALL, 1, 0, head=False) == 6 * VOCABULARY * 2560


@pytest.mark.parametrize("packing", [True, False])
def test_what_a_batch_counts_is_of_its_samples_on_all_ranks(packing):
    def sample(length):
        ids = np.arange(length, dtype=np.int32)
        return (Sample(token_ids=ids, loss_mask=ids > 1, source="rows:1"),)

    for rank in range(2):
        layout = Layout(
            packing=packing, pack_length=12, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=2,
            context_parallel_size=2,
        )  # fmt: skip
        groups = [sample(length) for length in (3, 5, 7, 4)]
        first, second = pack(groups, minibatch_size=3, layout=layout, aggregation="token-mean", pad_token_id=0).minibatches
        assert (first.real_tokens, first.squared_lengths) == (15, 9 + 25 + 49)
        assert (second.real_tokens, second.squared_lengths) == (4, 16)


def test_a_plan_counts_what_training_counts():
    config = load_config(None, ["objective.name=psft", "train.minibatch_size=32", "data.max_length=4096"])
    plan = estimate(config, DENSE, Machines(gpu=GPUS["h100"], nodes=1, gpus_per_node=8))
    useful = 256 * model_flops(DENSE, 4096, 4096**2)  # of a step: neither the old policy's passes, nor logits made twice
    assert plan.model_flops_utilization == pytest.approx(useful / plan.time.total / (8 * 989e12))
