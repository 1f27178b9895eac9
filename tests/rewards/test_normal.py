"""One spelling, and numbers. Not here: what is equal in mathematics only (test_math_answer.py)."""

import pytest

from megapsft.rewards._normal import normalised, number


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("42", " 42. "),
        ("$42$", r"\(42\)"),
        (r"\$18", "18"),
        ("1{,}234", "1,234"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{ (C) }", r"\textbf{(C)}"),
        (r"\left( 3, \dfrac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\tfrac{1}{2}", r"\frac{1}{2}"),
        (r"x \in [0,\, 1)", r"x\in[0,1)"),
    ],
)
def test_spellings_of_the_same(one, other):
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("-1", "1"), ("1.5", "15"), ("1...", "1"), (r"\leftarrow", "arrow"), ("a", "A"), ("[0,1)", "[0,1]"), ("50%", "50")],
)
def test_what_differs_stays_different(one, other):
    assert normalised(one) != normalised(other)


@pytest.mark.parametrize(
    ("one", "other"), [("42.0", "42"), ("+7", "7"), ("1,234.50", "1234.5"), ("-0", "0"), (".5", "0.5"), ("5.", "5")]
)
def test_equal_numbers(one, other):
    assert number(one) == number(other) is not None


@pytest.mark.parametrize(
    "text", ["", "-", ".", "+.", "1,23", "1234,567", ",123", "1e9", "٤٢", "４２", "1/2", "0x1", "nan", "inf", "1_000", "1" * 1001]
)
def test_what_is_no_number(text):
    assert number(text) is None


def test_numbers_are_exact():
    assert number("0.1000000000000000000000000000000000001") != number("0.1")
    assert number("9" * 1000) == int("9" * 1000)
