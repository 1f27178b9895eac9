"""Each family against transformers: the same logits from the same weights, and the same weights back, under several splits.

Not tested here: Transformer Engine's layers (tests/gpu), gradients.
"""

from pathlib import Path

import pytest
import torch
import transformers

from megapsft.checkpoint.hf import export_stream, import_hf, read_config
from megapsft.checkpoint.weights import rows_of
from megapsft.checkpoint.weights.hf import HFWeights
from megapsft.checkpoint.weights.part import language_model
from megapsft.config import ModelConfig, ParallelConfig
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.parallel import initialize, plan_mesh, shutdown
from megapsft.policy.build import build_chunks, distribute, model_shape, transformer_config
from tests.ranks import run_ranks
from tests.vision import NESTED, RELEASED, qwen2_5_vl

VOCAB = 131  # prime: every split pads it
SIZES = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, attn_implementation="eager")  # fmt: skip
DEFAULT = dict(rope_type="default", rope_theta=1e6)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=3.0, low_freq_factor=1.0, high_freq_factor=3.5,
              original_max_position_embeddings=24)  # fmt: skip
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[])
MODELS = {
    "qwen3": ("Qwen3", dict(head_dim=24, rope_parameters=DEFAULT)),
    "qwen3-tied": ("Qwen3", dict(head_dim=24, rope_parameters=DEFAULT, tie_word_embeddings=True)),
    "qwen3-moe": ("Qwen3Moe", dict(head_dim=24, rope_parameters=DEFAULT, norm_topk_prob=True, **EXPERTS)),
    "qwen3-moe-unnormalised": ("Qwen3Moe", dict(head_dim=24, rope_parameters=DEFAULT, norm_topk_prob=False, **EXPERTS)),
    "qwen2": ("Qwen2", dict(rope_parameters=DEFAULT)),
    "qwen2-linear": ("Qwen2", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "llama": ("Llama", dict(rms_norm_eps=1e-5, rope_parameters=LLAMA3)),
    "qwen2.5-vl": ("Qwen2_5_VL", dict(layout=RELEASED)),
    "qwen2.5-vl-nested": ("Qwen2_5_VL", dict(layout=NESTED, tied=True)),
}
TP2 = dict(tensor_model_parallel_size=2)
PP2 = dict(pipeline_model_parallel_size=2)
EP2 = dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1)
LAYOUTS = [
    ("qwen2", 2, TP2),
    ("qwen3-tied", 2, PP2),
    ("qwen3-tied", 4, {**TP2, **PP2, "virtual_pipeline_model_parallel_size": 2}),
    ("qwen3", 2, {}),  # two replicas
    ("qwen2.5-vl", 2, TP2),
    ("qwen2.5-vl-nested", 2, PP2),
    ("qwen3-moe", 2, EP2),
    ("qwen3-moe", 4, {**TP2, **PP2, **EP2}),
    ("qwen3-moe", 4, {**TP2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
]


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A random model whose norms and biases, too, are not what an untouched parameter would hold."""
    prefix, options = MODELS[name]
    if prefix == "Qwen2_5_VL":
        qwen2_5_vl(folder, **options)
        return
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **options)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2 if parameter.ndim == 1 else 0.06)
    model.to(dtype).save_pretrained(folder)


def token_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 48), generator=torch.Generator().manual_seed(1))


def start(folder: Path, world_size: int, split: dict, dtype: str = "float32"):
    """The model of `folder` on this rank, every parameter NaN, wrapped where it is bfloat16."""
    parallel, model = ParallelConfig(**split), ModelConfig(dtype=dtype, moe_token_dispatcher_type="allgather")
    hf = read_config(folder)
    family = family_of(hf)
    mesh = plan_mesh(parallel, world_size, model_shape(hf), torch.cuda.is_available(), model.moe_token_dispatcher_type)
    initialize(mesh, parallel, seed=1)
    config = transformer_config(family, hf, model, parallel, mesh)
    chunks = build_chunks(config, hf, model, mesh)
    if config.bf16:
        chunks = distribute(chunks, config, parallel)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    return chunks, hf


def megatron(folder: Path, world_size: int, split: dict, dtype: str = "float32"):
    """Runs on every rank: whether all was filled, logits [2, 48, VOCAB] where one rank has them, what it exports (as fp32)."""
    chunks, hf = start(folder, world_size, split, dtype)
    import_hf(chunks, folder, hf)
    filled = all(parameter.isfinite().all() for chunk in chunks for parameter in chunk.parameters())
    logits = None
    if world_size == 1:
        ids = token_ids()
        with torch.no_grad():
            logits = chunks[0].eval()(ids, torch.arange(48).expand_as(ids), None)[..., :VOCAB].numpy()
    exported = []
    for name, tensor in export_stream(chunks, hf):
        assert tensor is None or str(tensor.dtype) == f"torch.{dtype}"
        exported.append((name, None if tensor is None else tensor.float().numpy()))
    shutdown()
    return filled, logits, exported


def mismatched(built: Path, imported: Path) -> list[str]:
    """Runs on one rank: what import and export of one model into another are refused with."""
    chunks, _ = start(built, 1, {})
    hf, messages = read_config(imported), []
    for attempt in (lambda: import_hf(chunks, imported, hf), lambda: list(export_stream(chunks, hf))):
        try:
            attempt()
        except Refused as refusal:
            messages.append(str(refusal))
    shutdown()
    return messages


def check_export(folder: Path, results: list) -> None:
    """That rank 0 has the source's tensors bit by bit, and the other ranks the same names."""
    hf = read_config(folder)
    stored = HFWeights(folder, spelling=family_of(hf).spelling)
    source = {name: rows_of(stored, name) for name in language_model(stored, family_of(hf)).tensors}
    _, _, first = results[0]
    assert [name for name, _ in first] == sources(folder)
    assert {name for name, _ in first} == set(source)
    for name, array in first:
        assert torch.equal(torch.from_numpy(array), source[name].float()), name
    for filled, _, exported in results:
        assert filled
        assert [name for name, _ in exported] == [name for name, _ in first]
    assert all(array is None for _, _, exported in results[1:] for _, array in exported)


def sources(folder: Path) -> list[str]:
    hf = read_config(folder)
    return [name for rule in family_of(hf).parameters(hf) for name in rule.sources]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_and_the_weights_come_back(name, tmp_path):
    make(name, tmp_path)
    results = run_ranks(1, megatron, tmp_path, 1, {})
    check_export(tmp_path, results)
    architecture = getattr(transformers, read_config(tmp_path).architecture)
    model = architecture.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(token_ids()).logits
    torch.testing.assert_close(torch.from_numpy(results[0][1]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "world_size", "split"), LAYOUTS, ids=lambda value: str(value))
def test_every_split_gives_the_weights_back(name, world_size, split, tmp_path):
    make(name, tmp_path)
    check_export(tmp_path, run_ranks(world_size, megatron, tmp_path, world_size, split))


def test_wrapped_for_mixed_precision_and_a_sharded_optimizer(tmp_path):
    make("qwen3", tmp_path, torch.bfloat16)
    split = {**TP2, "use_distributed_optimizer": True}
    check_export(tmp_path, run_ranks(4, megatron, tmp_path, 4, split, "bfloat16"))


@pytest.mark.parametrize(
    ("built", "imported", "message"),
    [
        (
            "qwen3",
            "llama",
            "parameter decoder.layers.0.self_attention.q_layernorm.weight: is not a parameter of LlamaForCausalLM",
        ),
        (
            "llama",
            "qwen3",
            "parameter decoder.layers.0.self_attention.q_layernorm.weight: is not in the model, but in the checkpoint",
        ),
    ],
)
def test_no_parameter_is_lost_or_left_over_in_silence(built, imported, message, tmp_path):
    for name in (built, imported):
        make(name, tmp_path / name)
    messages = run_ranks(1, mismatched, tmp_path / built, tmp_path / imported)[0]
    assert len(messages) == 2
    assert all(text.startswith(message) for text in messages)
