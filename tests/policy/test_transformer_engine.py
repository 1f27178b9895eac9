"""Policies of Transformer Engine's layers, as far as a machine without a GPU can show: Megatron's own modules over a stand-in.

The stand-in (tests/gpu/standin) multiplies in plain torch; all else, from the spec to checkpoints, is what runs on a GPU, where
tests/gpu/test_transformer_engine.py makes the same measurements of the real thing. Not here: several ranks.
"""

from __future__ import annotations

import pytest

from tests.gpu.measured import measured, random_slice

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
TRAINED = ["data.max_length=512", "data.pack_length=1024", "train.batch_size=8", "train.minibatch_size=4", "train.steps=2",
           "optimizer.lr=1e-3"]  # fmt: skip
FP8, DELAYED = ["fp8.format=hybrid"], ["fp8.format=hybrid", "fp8.recipe=delayed", "fp8.amax_history_len=4"]
LOCAL = ["model.transformer_impl=local"]


@pytest.fixture(scope="module")
def found(tiny_models, tiny_data, tmp_path_factory):
    """What one process measured, by a name of ours."""
    root = tmp_path_factory.mktemp("te")
    moe, dense = str(tiny_models("qwen3_moe")), str(tiny_models("qwen3"))
    trained = {"data": str(tiny_data), "run": str(root / "run")}
    sizes = dict(hidden_size=64, moe_intermediate_size=48, num_experts=4, vocab_size=600)
    sliced = str(random_slice("qwen3_moe", sizes, 2, tiny_data, root / "sliced"))
    jobs = {family: ["agreement", {"folder": str(tiny_models(family)), "options": []}] for family in FAMILIES}
    jobs |= {
        "in fp8": ["agreement", {"folder": moe, "options": FP8}],
        "in bf16 after all": ["agreement", {"folder": dense, "options": [*FP8, "fp8.num_layers_at_start_in_bf16=3"]}],
        "all in fp8": ["agreement", {"folder": dense, "options": FP8}],
        "packed": ["packed", {"folder": dense, "options": []}],
        "packed experts": ["packed", {"folder": moe, "options": []}],
        "packed in fp8": ["packed", {"folder": dense, "options": FP8}],
        "products": ["products", {"folder": moe, "options": []}],
        "products in fp8": ["products", {"folder": moe, "options": FP8}],
        "psft": ["psft", {"folder": sliced, "options": [*TRAINED, *FP8], "steps": 2, **trained}],
        "delayed": ["resumed", {"folder": dense, "before": [*TRAINED, *DELAYED], "after": [*TRAINED, *DELAYED], **trained}],
        "from local": ["resumed", {"folder": moe, "before": [*TRAINED, *LOCAL], "after": TRAINED, **trained}],
        "to local": ["resumed", {"folder": dense, "before": TRAINED, "after": [*TRAINED, *LOCAL], **trained}],
    }
    for number, (_, options) in enumerate(jobs.values()):
        if "run" in options:
            options["run"] = str(root / f"run{number}")
    return measured(jobs, root, "--standin")


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_of_packed_rows_are_those_of_transformers(found, family):
    """As near to fp32 as bfloat16 in transformers is."""
    one = found[family]
    assert one["tokens"] == 99
    assert one["mean"] < 1.5 * one["mean_of_transformers"]


def test_products_in_fp8_are_in_fp8_where_they_should_be(found):
    assert 1e-3 < found["in fp8"]["mean"] < 0.05
    assert found["in bf16 after all"]["mean"] < found["all in fp8"]["mean"]


@pytest.mark.parametrize("kind", ["packed", "packed experts", "packed in fp8"])
def test_a_pack_is_its_sequences(found, kind):
    """Gradients of the pack are summed in another order; scales of a whole pack are not those of its parts."""
    one = found[kind]
    assert one["gradient_norm"] > 0
    if kind == "packed in fp8":
        assert one["mean"] < 0.05
    else:
        assert one["max"] < 1e-2
        assert one["gradient"] < 1e-2


def test_products_against_fp64(found):
    for kind in ("LayerNormLinear", "Linear", "GroupedLinear"):
        for part in ("output", "input", "weight"):
            assert found["products"][kind][part] < 6e-3
            assert 6e-3 < found["products in fp8"][kind][part] < 0.06


def test_psft_in_fp8_starts_at_ratio_one_and_learns(found):
    first, second = found["psft"]["ratio"][0::2], found["psft"]["ratio"][1::2]
    assert first == [[1.0, 1.0], [1.0, 1.0]]
    assert all(least < 1 < largest for least, largest in second)
    assert found["psft"]["nll"][2] < found["psft"]["nll"][0]
    assert found["psft"]["layers"] == "transformer_engine"


def test_delayed_scales_are_resumed_to_the_bit(found):
    one = found["delayed"]
    assert one["states"] == 16  # four linear modules in each of four layers
    assert one["went_on"] == one["again"]


@pytest.mark.parametrize("kind", ["from local", "to local"])
def test_a_run_goes_on_with_the_other_kind_of_layers(found, kind):
    one = found[kind]
    assert one["again"] == pytest.approx(one["went_on"], abs=1e-3)
