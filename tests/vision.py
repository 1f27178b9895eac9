"""Small random models that see images, in both ways that checkpoints of them are written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file

SIZES = dict(vocab_size=131, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-6)  # fmt: skip
ROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])
TOKENS = dict(image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6)
VISION = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, window_size=16, fullatt_block_indexes=[1])
NESTED, RELEASED = "nested", "released"


def qwen2_5_vl(folder: Path, layout: Literal["nested", "released"], tied: bool = False, **sizes: Any) -> Path:
    """A random Qwen2.5-VL whose norms and biases, too, are not what an untouched parameter would hold.

    Args:
        layout: nested, as transformers 5 calls its modules and nests its config; or released, with the names and the flat
            config.json of the published checkpoints.
    """
    text = {**SIZES, "rope_parameters": ROPE, **sizes}
    vision = {**VISION, "out_hidden_size": text["hidden_size"]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "bos_token_id": None, "eos_token_id": None}, vision_config=vision, tie_word_embeddings=tied, **TOKENS
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if parameter.ndim == 1 else 0.06)
    model.save_pretrained(folder, save_original_format=layout == RELEASED)
    if layout == RELEASED:
        (folder / "config.json").write_text(json.dumps(flat(model.config, text)))
    return folder


def flat(config: transformers.Qwen2_5_VLConfig, text: dict[str, Any]) -> dict[str, Any]:
    """The config.json that transformers 4.41 wrote."""
    text, rope = dict(text), dict(text["rope_parameters"])
    del text["rope_parameters"]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 28,
        **text,
        **TOKENS,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
        "vision_config": {**VISION, "out_hidden_size": text["hidden_size"]},
    }


def with_tokenizer(folder: Path, source: Path) -> Path:
    """The folder with the tokenizer and the chat template of another."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, folder / name)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, under the names that its files have for them."""
    return {name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()}


def of_vision(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.removeprefix("model.").startswith("visual.")}
