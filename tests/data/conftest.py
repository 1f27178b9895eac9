"""A real tokenizer, small enough to train in a second, and the chat templates that tests put on it."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megapsft.data.arithmetic import generate
from megapsft.data.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["question"] + row["answer"] for row in generate(200, seed=0)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # as in Llama: a text gets a first token unless told not to
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


@pytest.fixture
def model_dir(byte_bpe, tmp_path):
    """Writes a model folder with the given chat template and special tokens."""

    def write(chat_template: str | None = CHATML, **special) -> Path:
        special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"} | special
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_bpe, **special)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return write


@pytest.fixture
def chatml(model_dir) -> ChatTemplate:
    return ChatTemplate.load(model_dir())
