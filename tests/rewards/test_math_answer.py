r"""Right and wrong answers, and answers that are made to hurt. Not here: what the final answer is (test_answer.py)."""

import pytest

import megapsft.rewards.math_answer as math_answer
from megapsft.errors import Refused
from megapsft.rewards._base import Part
from megapsft.rewards._pool import Pool
from megapsft.rewards.math_answer import MathAnswer, plainly, score

VARIANTS = [{"timeout": 2.0}]  # for the contract

ENDLESS = [r"9^{9^{9^9}}", r"\sum_{n=1}^{10^{12}} \frac{1}{n^3}", r"(10^{8})!", r"10^{10^{10}}", r"(x+1)^{100000}"]


@pytest.fixture(scope="module")
def pool():
    made = Pool(2)
    yield made
    made.close()


def box(answer):
    return f"So it is \\boxed{{{answer}}}."


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        (box("42"), "42"),
        (box("42.0"), "42"),
        (box("1,234"), "Janet has 1234.\n#### 1234"),
        (box(r"\$18"), "9 * 2 = $<<9*2=18>>18 every day.\n#### 18"),
        ("#### 72", "... = 72\n#### 72"),
        (box(r"\frac{84}{2}"), "42"),
        (box(r"\frac12"), "0.5"),
        (box(r"\dfrac{\sqrt{2}}{2}"), r"\frac{1}{\sqrt{2}}"),
        (box(r"x = 5"), "5"),
        (box(r"12 \text{ cm}"), "12"),
        (box(r"(x+1)^2"), r"x^2 + 2x + 1"),
        (box(r"\{2, 1\}"), r"\left\{1, 2\right\}"),
        (box(r"\left(3, \frac{\pi}{2}\right)"), r"(3, \pi/2)"),
        (box(r"\text{east}"), r"\text{east}"),
        (box("E"), r"\text{E}"),
    ],
)
def test_right_answers(pool, response, reference):
    assert score([(response, reference)], pool) == [Part(1.0)]


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("42", "42"),  # not marked as the answer
        (box("43"), "42"),
        (box("-42"), "42"),
        (box("0.333"), r"\frac{1}{3}"),
        (box("0.3333333"), "0.33333333"),
        (box(""), "42"),
        (box("41, 42"), "42"),
        (box(r"41 \boxed{42}"), "42"),
        (box("(1, 2)"), "(2, 1)"),
        (box("42") + box("41"), "42"),
        (box(r"42 \text{ or } 43"), "42"),
        (box(r"\text{west}"), r"\text{east}"),
        (box("4" * 5000), "4" * 5001),
        (box("x"), "y"),
        (box(r"\infty"), "42"),
        (box(r"\frac{1}{0}"), "42"),
        (box("??"), "42"),
    ],
)
def test_wrong_answers(pool, response, reference):
    assert score([(response, reference)], pool) == [Part(0.0)]


@pytest.mark.parametrize("answer", ENDLESS)
def test_endless_answers_are_late_and_the_next_are_not(pool, answer):
    right = (box(r"\frac{84}{2}"), "42")
    score([right], pool)  # warm
    assert score([right, (box(answer), "42"), right], pool, 1.0) == [Part(1.0), Part(0.0, "timeout"), Part(1.0)]


@pytest.mark.parametrize(
    "answer",
    [
        "(" * 10**6 + "1" + ")" * 10**6,
        "(" * 4000 + "1" + ")" * 4000,
        "{" * 4000 + "1" + "}" * 4000,
        r"\frac{" * 1500 + "1" + "}" * 1500,
        r"\sqrt{" * 1000 + "2" + "}" * 1000,
        "\\" * 9998,
        "\\" * 10**6,
        "1+" * 4000 + "1",
        "9" * 9999 + "+1",
        "signal only works in main thread of the main interpreter",
        "__import__('os').kill(1, 9)",
        "1\0",
        "\ud800",
        "\u0664\u0662",
        "\u202e24",
        "𝟜𝟚",
        r"\begin{pmatrix}" + r"1 & 2 \\" * 400 + r"\end{pmatrix}",
        "%",
        "$$",
        r"42\text{",
        "}{",
        "4 2" + " " * 9000 + "!",
    ],
    ids=lambda answer: f"{len(answer)}-{answer[:12]!r}",
)
def test_hostile_answers_are_wrong_and_harm_nobody(pool, answer):
    parts = score([(box(answer), "41"), ("#### " + answer, "41"), (box(r"\frac{82}{2}"), "41")], pool, 3.0)
    assert [part.value for part in parts] == [0.0, 0.0, 1.0]
    assert parts[2].failure is None


def test_memory_is_bounded():
    pool = Pool(1, memory_bytes=1 << 26)
    parts = score([(box("2^{2^{34}}"), "41"), (box(r"\frac{82}{2}"), "41")], pool, 20.0)
    assert parts[0].value == 0.0
    assert parts[1] == Part(1.0)
    pool.close()


@pytest.mark.parametrize("reference", [r"9^{9^{9^9}}", "(" * 1000, "\0", r"\frac{", "no mathematics at all"])
def test_a_reference_that_cannot_be_read_is_equal_to_itself_alone(pool, reference):
    assert [part.value for part in score([("#### " + reference, reference), (box("41"), reference)], pool, 1.0)] == [1.0, 0.0]


def test_order_is_kept_and_each_question_is_asked_once(pool, monkeypatch):
    pairs = [(box(rf"\frac{{{i % 7}}}{{2}}"), "1.5") for i in range(50)]
    asked = []
    ask = pool.map
    monkeypatch.setattr(pool, "map", lambda target, calls, seconds: asked.extend(calls) or ask(target, calls, seconds))
    assert [part.value for part in score(pairs, pool)] == [float(i % 7 == 3) for i in range(50)]
    assert len(asked) == 7


def test_what_is_plain_needs_no_worker(pool):
    pool = Pool(1)
    assert score([(box("1,234"), "1234.0"), (box("7"), "8"), ("?", "8"), (box("a"), "a")], pool) == [
        *map(Part, [1.0, 0.0, 0.0, 1.0])
    ]
    assert pool._processes == []
    assert plainly(r"\frac{1}{2}", "0.5") is None


def test_without_math_verify_it_is_refused(monkeypatch):
    monkeypatch.setattr(math_answer, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"needs math-verify, which is not installed; pip install 'megapsft\[math\]'"):
        MathAnswer()


def test_a_math_verify_that_does_not_work_is_refused_at_the_door(monkeypatch, pool):
    monkeypatch.setattr(math_answer, "EQUAL", "operator:eq")
    with pytest.raises(Refused, match="does not see that 0.5 is 1/2"):
        MathAnswer().check(pool)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), float("nan")])
def test_refuses_and_says_what_would_be_right(timeout):
    with pytest.raises(Refused, match="must be above 0 and finite"):
        MathAnswer(timeout=timeout)
