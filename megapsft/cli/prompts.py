"""What a row of a file asks: options that rollout and evaluate have in common."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What a row of the file asks."""  # the fields are arguments of load_benchmark

    prompt_column: str | None = None  # default: what problems are usually called.
    reference_column: str | None = None  # with the right answer, for --reward; default: what answers are usually called.
    system_prompt: str | None = None  # put before prompts that have no system turn.


PROMPTS = PromptOptions()
