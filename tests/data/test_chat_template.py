"""Not tested here: the templates of published models, which need their tokenizers; slow (pure Python) tokenizers."""

import json

import numpy as np
import pytest

from megapsft.data.arithmetic import generate
from megapsft.data.chat_template import ROWS_AT_ONCE, ChatTemplate
from megapsft.data.rows import Row
from megapsft.errors import Refused

NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def test_prompt_and_response_are_the_template_and_one_terminator(chatml):
    token_ids, prompt_length = chatml.encode("2 + 3?", "It is 5.", None)
    decode = chatml.tokenizer.decode
    assert decode(token_ids[:prompt_length]) == "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(token_ids[prompt_length:]) == "It is 5.<|im_end|>"
    assert token_ids.dtype == np.int32


def test_the_whole_is_the_template_of_the_whole_conversation(chatml):
    """Tokenised in two parts, the sequence is that of the finished conversation up to the terminator."""
    turns = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "It is 5."}]
    text = chatml.tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
    assert chatml.encode("2 + 3?", "It is 5.", None)[0].tolist() == chatml.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_tokenizer_adds_no_tokens_of_its_own(chatml):
    added = chatml.tokenizer.eos_token_id
    assert chatml.tokenizer("q")["input_ids"][0] == added
    assert added not in chatml.encode("q", "a", None)[0]


def test_the_terminator_is_read_from_the_template_not_from_the_eos_token(chatml):
    assert chatml.tokenizer.convert_ids_to_tokens(chatml.terminator_id) == "<|im_end|>"
    assert chatml.tokenizer.eos_token == "<|endoftext|>"


def test_a_demonstration_that_ends_with_the_terminator_gets_no_second(chatml):
    plain, with_end = chatml.encode("q", "a", None), chatml.encode("q", "a<|im_end|>", None)
    assert plain[0].tolist() == with_end[0].tolist()
    assert plain[1] == with_end[1]


@pytest.mark.parametrize("text", ["a<|im_end|>b", "a<|im_end|>\n", "a<|im_end|><|im_end|>"])
def test_a_terminator_inside_a_demonstration_is_refused(chatml, text):
    with pytest.raises(Refused, match=r"rows.jsonl:7: has the turn terminator <\|im_end\|> before its end"):
        list(chatml.encode_rows([Row("q", text, "rows.jsonl:7")]))


def test_other_special_tokens_in_a_text_stay_as_they_are_tokenised(chatml):
    token_ids, prompt_length = chatml.encode("q", "a<|endoftext|>b", None)
    assert chatml.tokenizer.eos_token_id in token_ids[prompt_length:]


def test_the_system_prompt_goes_before_prompts_without_a_system_turn(chatml):
    assert chatml.render_prompt("q", "Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq")


def test_a_system_turn_of_the_row_is_kept(chatml):
    messages = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "q"}]
    assert chatml.render_prompt(messages, "Be brief.") == chatml.render_prompt(messages, None)


def test_a_string_prompt_is_one_user_turn(chatml):
    assert chatml.render_prompt("q", None) == chatml.render_prompt([{"role": "user", "content": "q"}], None)


def test_rows_encode_together_as_they_do_alone(chatml):
    rows = [Row(row["question"], row["answer"], "") for row in generate(ROWS_AT_ONCE + 20, seed=1)]
    together = list(chatml.encode_rows(rows, "Be brief."))
    assert len(together) == len(rows)
    for row, (token_ids, prompt_length) in list(zip(rows, together, strict=True))[-30:]:
        alone = chatml.encode(row.prompt, row.demonstration, "Be brief.")
        assert alone[0].tolist() == token_ids.tolist()
        assert alone[1] == prompt_length


def test_padding_is_the_tokenizers_own(chatml):
    assert chatml.pad_token_id == chatml.tokenizer.pad_token_id


def test_padding_without_a_pad_token_is_the_terminator(model_dir):
    template = ChatTemplate.load(model_dir(pad_token=None))
    assert template.pad_token_id == template.terminator_id


def test_no_chat_template_is_refused(model_dir):
    with pytest.raises(Refused, match="has no chat template"):
        ChatTemplate.load(model_dir(chat_template=None))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
        "{% for m in messages %}{{ m['content'] }} <|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}",
    ],
)
def test_a_template_whose_turns_do_not_end_with_a_special_token_is_refused(model_dir, template):
    with pytest.raises(Refused, match="must end an assistant turn with a special token"):
        ChatTemplate.load(model_dir(chat_template=template))


def test_turns_that_the_template_does_not_take_are_refused_with_the_row(model_dir):
    template = ChatTemplate.load(model_dir(chat_template=NO_SYSTEM))
    with pytest.raises(Refused, match=r"rows.jsonl:3: turns \[system, user\]: .*no system role here"):
        list(template.encode_rows([Row("q", "a", "rows.jsonl:3")], "Be brief."))


def test_a_template_that_is_not_a_template_is_refused(model_dir):
    with pytest.raises(Refused, match="are not taken by the chat template"):
        ChatTemplate.load(model_dir(chat_template="{% for %}"))


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(Refused, match="is not a folder"):
        ChatTemplate.load(tmp_path / "none")


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(Refused, match="has no readable tokenizer"):
        ChatTemplate.load(tmp_path)


def test_a_model_config_without_tokenizer_is_refused(tmp_path):
    """`transformers` makes a tokenizer without words of it."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(Refused, match="has no tokenizer vocabulary"):
        ChatTemplate.load(tmp_path)


def test_a_broken_tokenizer_file_is_refused(model_dir):
    folder = model_dir()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(Refused, match="has no readable tokenizer"):
        ChatTemplate.load(folder)


@pytest.fixture
def seeing(model_dir) -> ChatTemplate:
    """Of a model that sees images."""
    folder = model_dir(additional_special_tokens=["<|image_pad|>"])
    image = ChatTemplate.load(folder).tokenizer.convert_tokens_to_ids("<|image_pad|>")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "image_token_id": image}))
    return ChatTemplate.load(folder)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (Row("Look: <|image_pad|>. How many?", "Two.", "rows.jsonl:2"), "<|image_pad|>"),
        (Row([dict(role="user", content="<image>\nHow many?")], "Two.", "rows.jsonl:2"), "<image>"),
        (Row("How many?", "As in <|image_pad|>.", "rows.jsonl:2"), "<|image_pad|>"),
    ],
)
def test_a_row_with_an_image_is_refused_where_the_model_would_see_it(row, found, seeing):
    rows = [Row("How many?", "Two.", "rows.jsonl:1"), row]
    with pytest.raises(Refused, match="which stands for an image or a video, and text alone is trained") as refusal:
        list(seeing.encode_rows(rows))
    assert refusal.value.value == "rows.jsonl:2"
    assert found in refusal.value.rule


def test_to_a_model_of_text_alone_the_same_words_are_words(chatml):
    assert chatml.media_token_ids == frozenset()
    ids, _ = chatml.encode("What does <image> mean?", "It is a tag.")
    assert "<image>" in chatml.tokenizer.decode(ids)
