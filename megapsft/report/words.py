"""Tokens as text that can be seen."""

from __future__ import annotations

VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def spelt(text: str) -> str:
    """White space as signs, so that `the` and ` the`, which are two tokens, are told apart."""
    return text.translate(VISIBLE) or "∅"


__all__ = ["spelt"]
