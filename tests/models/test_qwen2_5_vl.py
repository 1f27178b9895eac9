"""The language model of Qwen2.5-VL in both kinds of config.json; what of it, and of its relatives, is refused."""

import json

import pytest
import transformers

from megapsft.checkpoint.hf import read_config
from megapsft.checkpoint.hf_folder import check_checkpoint
from megapsft.errors import Refused
from megapsft.models.families import FAMILIES, check_served, family_of, parameter_count
from megapsft.models.hf_config import HFConfig, Rope, both_spellings
from megapsft.models.names import Spelling
from tests.shipped import FOLDER
from tests.vision import NESTED, RELEASED, qwen2_5_vl

SMALL = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2)
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {layout: qwen2_5_vl(root / layout, layout, **SMALL) for layout in (NESTED, RELEASED)}


def edited(folder, **changes) -> HFConfig:
    return HFConfig.parse(json.loads((folder / "config.json").read_text()) | changes)


def test_both_kinds_of_config_say_the_same(folders):
    nested, released = (read_config(folders[layout]) for layout in (NESTED, RELEASED))
    assert "text_config" in nested.raw
    assert "text_config" not in released.raw
    assert nested == released
    assert nested.rope == Rope(theta=1e6, mrope_section=(2, 3, 3))
    assert (nested.hidden_size, nested.head_dim, nested.dtype) == (32, 16, "float32")


@pytest.mark.parametrize("layout", [NESTED, RELEASED])
def test_rules_are_the_language_model_and_nothing_of_the_vision_tower(layout, folders):
    hf = read_config(folders[layout])
    stored = check_checkpoint(folders[layout], family_of(hf), hf).shapes
    rules = family_of(hf).parameters(hf)
    used = [(name, shape) for rule in rules for name, shape in rule.sources.items()]
    assert dict(used) == stored
    assert len(used) == len(stored)
    assert not any("visual" in name for name in stored)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folders[layout])
    seen = sum(parameter.numel() for parameter in model.model.visual.parameters())
    assert parameter_count(hf) == model.num_parameters() - seen > 0


@pytest.mark.parametrize("layout", [NESTED, RELEASED])
def test_transformers_reads_what_is_written_for_both_of_its_versions(layout, folders, tmp_path):
    raw = read_config(folders[layout]).raw
    both = both_spellings(raw)
    assert HFConfig.parse(both) == HFConfig.parse(raw)
    assert both_spellings(both) == both
    text = both["text_config"] if layout == NESTED else both
    assert text["rope_scaling"] == {"mrope_section": [2, 3, 3], "rope_type": "default"}  # transformers 4 computes with it
    assert text["rope_theta"] == 1e6
    (tmp_path / "config.json").write_text(json.dumps(both))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.text_config.rope_parameters == dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])
    assert config.text_config.hidden_size == 32
    assert config.vision_config.depth == 2


def test_the_shipped_shape_is_that_of_seven_billion():
    hf = read_config(FOLDER / "models/Qwen2.5-VL-7B-Instruct")
    assert parameter_count(hf) == parameter_count(read_config(FOLDER / "models/Qwen2.5-7B-Instruct")) == 7_615_616_512


def test_names_are_spelt_there_and_back():
    spelling = family_of(read_config(FOLDER / "models/Qwen2.5-VL-7B-Instruct")).spelling
    for there, here in (
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ):
        assert (spelling.here(there), spelling.there(here)) == (here, there)
        assert (Spelling().here(there), Spelling().there(here)) == (there, here)
    assert spelling.fits(["model.language_model.norm.weight", "lm_head.weight"])
    assert not spelling.fits(["model.language_model.norm.weight", "visual.merger.ln_q.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rope_scaling={"type": "mrope"}), "mrope_section of rope type 'mrope': is missing"),
        (dict(rope_scaling=MROPE | {"mrope_section": 8}), "mrope_section=8: must be a list of numbers"),
        (dict(rope_scaling=None), "mrope_section=None of .*: must share out the 8 pairs of dimensions of a head"),
        (dict(rope_scaling=MROPE | {"mrope_section": [2, 3, 4]}), r"mrope_section=\[2, 3, 4\] of .*: must share out the 8 pairs"),
        (dict(use_sliding_window=True), "must be full attention in every layer"),
    ],
)
def test_refused(change, message, folders):
    def parameters():
        hf = edited(folders[RELEASED], **change)
        return family_of(hf).parameters(hf)

    with pytest.raises(Refused, match=message):
        parameters()


def test_a_size_that_is_said_twice_and_differs(folders):
    with pytest.raises(Refused, match="hidden_size=64, text_config.hidden_size=32: contradict each other"):
        edited(folders[NESTED], hidden_size=64)


def test_embeddings_are_tied_where_either_transformers_would_tie_them(folders):
    text = read_config(folders[NESTED]).raw["text_config"]
    assert not edited(folders[NESTED]).tie_word_embeddings
    assert edited(folders[NESTED], text_config=text | dict(tie_word_embeddings=True)).tie_word_embeddings
    assert edited(folders[NESTED], tie_word_embeddings=True).tie_word_embeddings


def test_no_other_family_has_such_a_rope(folders):
    hf = edited(folders[RELEASED], architectures=["Qwen2ForCausalLM"])
    with pytest.raises(Refused, match=r"mrope_section=\[2, 3, 3\] of Qwen2ForCausalLM: is of models that see images"):
        family_of(hf)


@pytest.mark.parametrize("architecture", ["Qwen2VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"])
@pytest.mark.parametrize("layout", [NESTED, RELEASED])
def test_its_relatives_are_refused_by_name_whatever_else_their_config_says(architecture, layout, folders, tmp_path):
    raw = json.loads((folders[layout] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | dict(architectures=[architecture], hidden_act="gelu")))
    with pytest.raises(Refused, match=f"architecture {architecture}: is not supported; use one of " + ", ".join(FAMILIES)):
        read_config(tmp_path)


def test_servers_are_not_given_it(folders):
    check_served(read_config(FOLDER / "models/Qwen2.5-7B-Instruct"), "rollout.engine=sglang")
    with pytest.raises(Refused, match="rollout.engine=sglang: is not for Qwen2_5_VLFor.* torchvision; use the engine inprocess"):
        check_served(read_config(folders[RELEASED]), "rollout.engine=sglang")
