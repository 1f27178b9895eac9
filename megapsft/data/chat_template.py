"""Text to token ids, the way the model's own chat template writes a conversation."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megapsft.data.rows import Prompt, Row
from megapsft.errors import Refused

MEDIA_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
MEDIA_WORDS = ("<image>", "<video>")  # what many files of rows have where one of another column belongs
ROWS_AT_ONCE = 1024  # handed to the tokenizer together: enough for its threads, and few enough that lists of ids stay small
IDS_ALONE = {  # masks of ones, as long as the ids, would take a fifth of the time
    "add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False,
}  # fmt: skip


class ChatTemplate:
    """A tokenizer, its chat template, and the token that ends a turn in it.

    A prompt is the template over its messages with the generation prompt; a response is the demonstration and exactly one
    turn terminator. Neither gets further special tokens; special tokens spelt out in a text become those tokens, except
    that a terminator inside a demonstration is refused.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int] = (), media_token_ids: Collection[int] = ()):
        """
        Args:
            tokenizer: a `transformers` tokenizer.
            eos_token_ids: of the model's generation_config.json.
            media_token_ids: of the model's config.json: those that stand for an image or a video, which no text has.

        Raises:
            Refused: it has no chat template, or one that does not end an assistant turn with a special token.
        """
        self.tokenizer = tokenizer
        self.media_token_ids = frozenset(media_token_ids)
        if tokenizer.chat_template is None:
            rule = f"the tokenizer in {tokenizer.name_or_path!r} has no chat template"
            raise Refused("chat_template=None", rule, "use an instruct model, or add a chat_template.jinja next to the tokenizer")
        self.terminator_id = self._find_terminator()
        eos = {tokenizer.eos_token_id} - {None}
        self.stop_token_ids = tuple(sorted({self.terminator_id, *eos, *eos_token_ids}))  # what ends a response that is sampled

    @classmethod
    def load(cls, model_dir: str | Path) -> ChatTemplate:
        """The chat template of a Hugging Face model folder; nothing is downloaded and no code of the folder runs.

        Raises:
            Refused: no folder, no tokenizer in it, or one that `ChatTemplate` refuses.
        """
        return cls(load_tokenizer(model_dir), eos_token_ids(Path(model_dir)), media_token_ids(Path(model_dir)))

    @property
    def pad_token_id(self) -> int:
        """What fills masked positions; any token of the vocabulary serves, so the terminator where the tokenizer names none."""
        pad = self.tokenizer.pad_token_id
        return self.terminator_id if pad is None else pad

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Tokens that no words become, ascending."""
        return tuple(sorted(number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special))

    def spell(self, ids: Sequence[int]) -> str:
        """The text of the tokens, special ones spelt out."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def render_prompt(self, prompt: Prompt, system_prompt: str | None = None) -> str:
        """The text of the prompt up to where the response begins.

        Args:
            prompt: one user turn, or chat messages.
            system_prompt: put before prompts that have no system turn.

        Raises:
            Refused: the template does not take these messages.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system_prompt is not None and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": system_prompt}, *messages]
        return self._render(messages, add_generation_prompt=True)

    def encode(self, prompt: Prompt, demonstration: str, system_prompt: str | None = None) -> tuple[np.ndarray, int]:
        """(token_ids [n] int32, prompt_length): the first prompt_length ids are the prompt, the others the response.

        Raises:
            Refused: as `encode_rows`.
        """
        return next(self.encode_rows([Row(prompt, demonstration, "the demonstration")], system_prompt))

    def encode_rows(self, rows: Sequence[Row], system_prompt: str | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """`encode` of each row, in order, tokenised many at a time.

        Raises:
            Refused: the template does not take the messages, or the terminator stands inside the demonstration; names the row.
        """
        sources = [row.source for row in rows]
        prompts = self.encode_prompts([row.prompt for row in rows], sources, system_prompt)
        responses = self.encode_responses([row.demonstration for row in rows], sources)
        for prompt, response in zip(prompts, responses, strict=True):
            yield np.array(prompt + response, dtype=np.int32), len(prompt)

    def encode_prompts(
        self, prompts: Sequence[Prompt], sources: Sequence[str], system_prompt: str | None = None
    ) -> Iterator[list[int]]:
        """The ids of each prompt, up to where the response begins, tokenised many at a time.

        Raises:
            Refused: the template does not take the messages, or an image stands in them; names the source.
        """
        for start in range(0, len(prompts), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            rows = zip(prompts[some], sources[some], strict=True)
            texts = [self._render_at(source, prompt, system_prompt) for prompt, source in rows]
            for ids, text, source in zip(self.tokenise(texts), texts, sources[some], strict=True):
                self.check_text(ids, source, text)
                yield ids

    def encode_responses(
        self, responses: Sequence[str], sources: Sequence[str], finished: Sequence[bool] | None = None
    ) -> Iterator[list[int]]:
        """The ids of each response with its terminator, or without where it is not `finished`; tokenised many at a time.

        Raises:
            Refused: the terminator stands inside the response, or an image; names the source.
        """
        for start in range(0, len(responses), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            ids = self.tokenise(list(responses[some]))
            ends = [True] * len(ids) if finished is None else finished[some]
            for response, source, end in zip(ids, sources[some], ends, strict=True):
                self.check_text(response, source)
                yield self._terminate(response, source, end)

    def check_text(self, token_ids: Iterable[int], source: str, text: str = "") -> None:
        """That nothing stands for an image or a video, where the model sees any: no token, and no word that rows have for one.

        Raises:
            Refused: something does; names the source.
        """
        if not self.media_token_ids:
            return
        found = self.tokenizer.convert_ids_to_tokens(sorted(self.media_token_ids.intersection(token_ids)))
        found += [word for word in MEDIA_WORDS if word in text]
        if found:
            rule = f"holds {found[0]}, which stands for an image or a video, and text alone is trained"
            raise Refused(source, rule, "leave the row out")

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without further special tokens."""
        return self.tokenizer(texts, **IDS_ALONE)["input_ids"]

    def tokenise_with_ends(self, texts: list[str]) -> tuple[list[list[int]], list[list[int]] | None]:
        """`tokenise`, and of each token the index of its last character in the text; None where the tokenizer does not say."""
        if not (texts and self.tokenizer.is_fast):
            return self.tokenise(texts) if texts else [], None
        found = self.tokenizer(texts, return_offsets_mapping=True, **IDS_ALONE)
        return found["input_ids"], [[max(end - 1, start) for start, end in spans] for spans in found["offset_mapping"]]

    def _render_at(self, source: str, prompt: Prompt, system_prompt: str | None) -> str:
        try:
            return self.render_prompt(prompt, system_prompt)
        except Refused as refusal:
            raise Refused(f"{source}: {refusal.value}", refusal.rule, refusal.remedy) from None

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program of the model's makers: it may raise anything
            roles = ", ".join(message["role"] for message in messages)
            rule = f"are not taken by the chat template ({brief(error)})"
            raise Refused(f"turns [{roles}]", rule, "change the turns, data.system_prompt or the template") from None

    def _terminate(self, response: list[int], source: str, finished: bool) -> list[int]:
        """The ids of a response, ending with the terminator where it is finished; it is nowhere else."""
        if finished and (not response or response[-1] != self.terminator_id):
            response = [*response, self.terminator_id]
        if self.terminator_id in response[: len(response) - finished]:
            token = self.tokenizer.convert_ids_to_tokens(self.terminator_id)
            rule = f"has the turn terminator {token} before its end, so the model would learn to go on after its turn"
            raise Refused(source, rule, "split it into turns, or take the token out of the text")
        return response

    def _find_terminator(self) -> int:
        """The token that the template itself writes after the words of an assistant."""
        words = "a sentence that no template holds"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": words}]
        _, found, after = self._render(turns, add_generation_prompt=False).rpartition(words)
        first = self.tokenise([after])[0][:1] if found else []
        added = self.tokenizer.added_tokens_decoder
        if not (first and first[0] in added and added[first[0]].special):
            rule = "must end an assistant turn with a special token, directly after its words"
            raise Refused(f"chat template that goes on with {after[:40]!r}", rule, "use a model whose template does, or mend it")
        return first[0]


def load_tokenizer(model_dir: str | Path) -> Any:
    """The `transformers` tokenizer of a Hugging Face model folder; nothing is downloaded and no code of the folder runs.

    Raises:
        Refused: no folder, or no tokenizer in it.
    """
    from transformers import AutoTokenizer

    at = f"model.path={str(model_dir)!r}"
    remedy = "name a folder with tokenizer.json and tokenizer_config.json"
    if not Path(model_dir).is_dir():  # asked first, because anything else would be taken for a name on the hub
        raise Refused(at, "is not a folder", remedy)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # parsers of many formats, which raise what they like
        raise Refused(at, f"has no readable tokenizer ({brief(error)})", remedy) from None
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # config.json alone loads as a tokenizer without words
        raise Refused(at, "has no tokenizer vocabulary", remedy)
    return tokenizer


def eos_token_ids(model_dir: Path) -> tuple[int, ...]:
    """Those of generation_config.json; none where there is no such file, or it names none.

    Raises:
        Refused: it is not readable.
    """
    file = model_dir / "generation_config.json"
    if not file.is_file():
        return ()
    try:
        found = json.loads(file.read_text()).get("eos_token_id")
        return () if found is None else tuple(map(int, found if isinstance(found, list) else [found]))
    except (ValueError, TypeError, AttributeError) as error:
        raise Refused(str(file), f"is not readable ({brief(error)})", "mend it, or take it away") from None


def media_token_ids(model_dir: Path) -> frozenset[int]:
    """Those that config.json names as standing for images and videos; none where the model does not see any."""
    file = model_dir / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    return frozenset(config[key] for key in MEDIA_TOKENS if isinstance(config.get(key), int))


def brief(error: Exception) -> str:
    """An error of another library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
