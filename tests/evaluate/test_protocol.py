import pytest

from megapsft.evaluate.protocol import protocol_of


@pytest.mark.parametrize(
    ("name", "n", "max_tokens"),
    [("aime24", 32, 10240), ("AIME-2025", 32, 10240), ("amc", 32, 10240), ("math500", 8, 10240), ("MATH-500", 8, 10240),
     ("minerva", 8, 10240), ("gsm8k-test", 1, 10240), ("IFEval", 8, 4096), ("mmlu_pro", 1, 10240), ("mine", 8, 10240)],
)  # fmt: skip
def test_benchmarks_are_known_by_the_beginning_of_their_name(name, n, max_tokens):
    found = protocol_of(name)
    assert (found.n, found.max_tokens, found.temperature, found.top_p) == (n, max_tokens, 0.7, 0.95)
