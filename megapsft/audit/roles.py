"""Tokens by who wrote them."""

from __future__ import annotations

import numpy as np

from megapsft.data.chat_template import ChatTemplate
from megapsft.data.rows import Prompt

ROLES = ("template", "system", "user", "assistant", "tool", "prompt", "response", "terminator")  # prompt: its roles are not known
ROLE = {name: number for number, name in enumerate(ROLES)}


def roles_of_prompt(text: str, prompt: Prompt, system_prompt: str | None, ends: list[int] | None, count: int) -> np.ndarray:
    """[count] int8: of each token of the rendered prompt the role whose words hold its last character.

    What stands in no message, the template wrote: markers of turns, and a system turn that it brings itself.

    Args:
        ends: of each token the index of its last character in `text`; None where it is not known.
    """
    if ends is None:
        return np.full(count, ROLE["prompt"], np.int8)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]  # not found where it was not rendered
    of_character = np.full(len(text) + 1, ROLE["template"], np.int8)
    start = 0
    for message in messages:
        words = message["content"].strip()  # some templates strip it, none adds to it
        found = text.find(words, start) if words else -1
        if found >= 0:
            of_character[found : found + len(words)] = ROLE[message["role"]]
            start = found + len(words)
    return of_character[np.array(ends, dtype=np.int64)]


def roles_of_response(ids: list[int], template: ChatTemplate) -> np.ndarray:
    """[n] int8: the words, and the tokens that end a turn."""
    ending = np.isin(np.array(ids, dtype=np.int64), template.stop_token_ids)
    return np.where(ending, ROLE["terminator"], ROLE["response"]).astype(np.int8)
