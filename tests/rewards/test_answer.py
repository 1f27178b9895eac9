r"""The final answer of a text: boxes and `####`, by example and by brute force, and in linear time."""

import random

import pytest

from megapsft.rewards.answer import final_answer

PIECES = [
    "\\boxed{",
    "\\boxed {",
    "{",
    "}",
    "\\{",
    "\\}",
    "\\\\",
    "\\",
    "boxed{",
    "a",
    "7",
    "\n",
    " ",
    "####",
    "\0",
    "\ud800",
    "é",
]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("42", None),
        (r"\boxed{42}", "42"),
        (r"\boxed{ 42 }", "42"),
        (r"\boxed {42}", "42"),
        (r"\boxed{3} and \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{42}}", r"\boxed{42}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{a \\ b}", r"a \\ b"),
        (r"\boxed{3} cut off \boxed{4", "3"),
        (r"\boxed{cut off \boxed{4}", "4"),
        (r"\boxed{4", None),
        (r"\boxed 4", None),
        (r"\\boxed{4}", None),  # a line break, and a word
        (r"}}} \boxed{4} {{{", "4"),
        (r"\boxed{}", None),
        (r"\boxed{3} \boxed{}", None),  # what was said last is nothing
        (r"\boxed{ } #### 5", None),
        ("4 * 18 = 72\n#### 72", "72"),
        ("#### 72\nso 72", "72"),
        ("#### 1\n#### 1,234\n", "1,234"),
        ("####72", "72"),
        ("####", None),
        ("####\n5", None),
        (r"#### 72 \boxed{73}", "73"),
        (r"#### 72 \boxed{73", r"72 \boxed{73"),
    ],
)
def test_what_the_answer_is(text, answer):
    assert final_answer(text) == answer


def test_boxes_as_brute_force_finds_them():
    rng = random.Random(0)
    found = 0
    for _ in range(8000):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 14)))
        if (box := slow_box(text)) is not None:
            found += 1
            assert final_answer(text) == (box.strip() or None), repr(text)
    assert found > 500


def test_whatever_is_around_a_box_does_not_change_it():
    rng = random.Random(1)
    for _ in range(2000):
        before = "".join(rng.choices(PIECES, k=rng.randint(0, 12)))
        after = "".join(rng.choices([piece for piece in PIECES if "boxed" not in piece and "}" not in piece], k=5))
        if not before.endswith("\\"):
            assert final_answer(before + r"\boxed{x+{1}}" + after) == "x+{1}", repr(before)


@pytest.mark.parametrize(
    "piece", ["\\", "{", "}", "\\boxed{", "\\boxed", "\\boxed{1}", "\\boxed{}", "####", "#", "\\boxed ", " ", "\0"]
)
def test_millions_of_anything(piece):  # in quadratic time it would take hours
    text = piece * (4_000_000 // len(piece))
    assert final_answer(text) in (None, "1")
    assert final_answer(text + "\n" + r" \boxed{5}") == "5"


def slow_box(text):
    """What the last box holds that balances: each one tried, brace by brace."""
    tokens = []
    i = 0
    while i < len(text):
        box = next((piece for piece in ("\\boxed{", "\\boxed {", "\\boxed\n{") if text.startswith(piece, i)), None)
        size = len(box) if box else 2 if text[i] == "\\" and i + 1 < len(text) else 1
        tokens.append((i, text[i : i + size], box is not None))
        i += size
    ends = {}
    for first, (start, token, is_box) in enumerate(tokens):
        depth = 1
        for place, other, also_box in tokens[first + 1 :] if is_box else []:
            depth += (other == "{" or also_box) - (other == "}")
            if depth == 0:
                ends[place] = text[start + len(token) : place]
                break
    return ends[max(ends)] if ends else None
