"""Small models in folders, whole and damaged, and whether two of them hold the same bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.policy.test_families import MODELS as UNTIED
from tests.policy.test_families import SIZES

INDEX = "model.safetensors.index.json"
MODELS = {
    **UNTIED,
    "llama-tied": (UNTIED["llama"][0], {**UNTIED["llama"][1], "tie_word_embeddings": True}),
    "qwen2-tied": (UNTIED["qwen2"][0], {**UNTIED["qwen2"][1], "tie_word_embeddings": True}),
    "qwen3-moe-tied": (UNTIED["qwen3-moe"][0], {**UNTIED["qwen3-moe"][1], "tie_word_embeddings": True}),
}


def make_model(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, shards: bool = False, seed: int = 0, **sizes: int
) -> Path:
    """A random model whose norms and biases, too, are not what an untouched parameter would hold; in one file, or in many."""
    prefix, options = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **options, **sizes})
    transformers.logging.disable_progress_bar()
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2 if parameter.ndim == 1 else 0.06)
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB" if shards else "50GB")
    assert (folder / INDEX).is_file() == shards
    return folder


def make_dense(folder: Path, megabytes: int, layers: int = 2, vocab: int = 131, seed: int = 0) -> Path:
    """A Llama of about so many MB in fp32, most of it in MLPs; made without a model of `transformers`."""
    hidden, inner = 512, 256 * max(1, round(megabytes * 1e6 / (layers * 3 * 512 * 4 * 256)))
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (hidden if part in "qo" else hidden // 2, hidden) for part in "qkvo"}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}.{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    random = torch.Generator().manual_seed(seed)
    config.save_pretrained(folder)
    save_file({name: torch.randn(shape, generator=random) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All of them, as the `safetensors` library reads the folder."""
    index = folder / INDEX
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """The same names, dtypes, shapes and bits."""
    found, expected = tensors_in(ours), tensors_in(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def hashes(folder: Path) -> dict[str, str]:
    """Of every file below the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def partial_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"
