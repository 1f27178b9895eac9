"""Small random models: what transformers makes of them, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megapsft.checkpoint.hf_folder import check_checkpoint, read_config
from megapsft.checkpoint.random_init import FAMILIES, init_model
from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.models.families import family_of


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        dict(prompt=f"What is {number} plus {number + 5}?", demonstration=f"The sum is {2 * number + 5}, plainly.")
        for number in range(200)
    ]
    rows.append(dict(prompt=[dict(role="user", content="Grüße, 日本")], demonstration="Plainly: nothing to sum."))
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def make(data: Path, out: Path, family: str = "qwen3", **options) -> Path:
    return init_model(family, data, out, vocab_size=290, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_tokenizer_and_template_fit_together(family, tied, data, tmp_path):
    out = make(data, tmp_path / "model", family, tie_word_embeddings=tied)
    hf = read_config(out)
    check_checkpoint(out, family_of(hf), hf)
    template = ChatTemplate.load(out)
    tokenizer = template.tokenizer
    assert hf.vocab_size == len(tokenizer) <= 290
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(template.terminator_id) == tokenizer.eos_token == "<|im_end|>"
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)

    model = getattr(transformers, hf.architecture).from_pretrained(out)
    ids = torch.from_numpy(template.encode("What is 40 plus 45?", "The sum is 85, plainly.")[0].astype("int64"))[None]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert abs(float(loss) - math.log(hf.vocab_size)) < 0.15


def test_every_text_comes_back_and_digits_stand_alone(data, tmp_path):
    tokenizer = ChatTemplate.load(make(data, tmp_path / "model")).tokenizer
    text = "1234 + 10 = 1244; naïve 日本 🙂\n\tdone"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [token for token in tokenizer.convert_ids_to_tokens(ids) if any(c.isdigit() for c in token)] == list("1234101244")


def test_prompts_render_as_chatml(data, tmp_path):
    template = ChatTemplate.load(make(data, tmp_path / "model"))
    prompt = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert template.render_prompt("q", system_prompt="s") == prompt


def test_the_seed_decides(data, tmp_path):
    weights = [
        load_file(make(data, tmp_path / name, seed=seed) / "model.safetensors")["model.embed_tokens.weight"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_generator_of_the_caller_is_left_alone(data, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    make(data, tmp_path / "model")
    assert torch.equal(torch.rand(1), expected)


def test_bfloat16(data, tmp_path):
    out = make(data, tmp_path / "model", dtype="bfloat16")
    assert read_config(out).dtype == "bfloat16"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(family="gpt2"), "family='gpt2': is not known; use one of qwen3, qwen3_moe, qwen2, llama, qwen2_5_vl"),
        (dict(num_key_value_heads=3), "num_key_value_heads=3: must divide num_attention_heads=4; use one of 1, 2, 4"),
        (dict(head_dim=23), "head_dim=23: must be even"),
        (dict(num_layers=0), "num_layers=0: is no size; use 1 or more, such as num_layers=4"),
        (dict(family="qwen2_5_vl", num_layers=-1), "num_layers=-1: is no size"),
        (dict(hidden_size=0), "hidden_size=0: is no size"),
        (dict(max_position_embeddings=0), "max_position_embeddings=0: is no size"),
        (dict(family="llama", hidden_size=97), "num_attention_heads=4: must divide hidden_size=97"),
        (dict(family="qwen2", hidden_size=100), "hidden_size=100: must be num_attention_heads=4 x head_dim=24"),
        (dict(family="qwen2_5_vl", hidden_size=100), "must be num_attention_heads=4 x head_dim=24 for qwen2_5_vl"),
        (
            dict(family="qwen3_moe", num_experts=2, num_experts_per_tok=3),
            "num_experts_per_tok=3: must be between 1 and num_experts=2",
        ),
    ],
    ids=str,
)
def test_refused(options, message, data, tmp_path):
    with pytest.raises(Refused, match=message):
        make(data, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_refused_vocabulary(data, tmp_path):
    with pytest.raises(Refused, match="vocab_size=200: must be 259 or more"):
        init_model("qwen3", data, tmp_path / "model", vocab_size=200)


def test_refused_where_something_is_already(data, tmp_path):
    with pytest.raises(Refused, match="exists and is not an empty folder"):
        make(data, data.parent)


def test_a_model_that_sees_images_has_a_token_for_each_part_of_one(data, tmp_path):
    template = ChatTemplate.load(make(data, tmp_path / "model", "qwen2_5_vl"))
    tokens = template.tokenizer.convert_ids_to_tokens(sorted(template.media_token_ids))
    assert tokens == ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
