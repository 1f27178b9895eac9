"""What ReLIFT holds back. A whole run of its config, and one that is resumed: tests/e2e/test_rl.py."""

from megapsft.objectives.hpt import HPT
from megapsft.train.demonstration_buffer import DemonstrationBuffer
from tests.train.test_prepare import sample

UNSOLVED = (sample(0.0), sample(0.0), sample(1.0, True))
SOLVED = (sample(0.0), sample(1.0), sample(1.0, True))
WITHOUT = (sample(0.0), sample(0.0))


def demonstration(draw):
    return f"demonstration {draw}"


def test_unsolved_prompts_wait_until_there_are_enough():
    buffer = DemonstrationBuffer(3, HPT())
    assert buffer.exchange([UNSOLVED, SOLVED, UNSOLVED], [0, 1, 2], demonstration) == [SOLVED]
    assert buffer.held == [0, 2]
    assert buffer.exchange([SOLVED, WITHOUT], [3, 4], demonstration) == [SOLVED, WITHOUT]
    found = buffer.exchange([UNSOLVED, UNSOLVED, SOLVED], [5, 6, 7], demonstration)
    assert found == [SOLVED, ("demonstration 0",), ("demonstration 2",), ("demonstration 5",)]
    assert buffer.held == [6]
    assert len(buffer.exchange([UNSOLVED] * 6, list(range(8, 14)), demonstration)) == 6
    assert buffer.held == [13]


def test_none_is_held_without_a_size():
    buffer = DemonstrationBuffer(0, HPT())
    assert buffer.exchange([UNSOLVED, SOLVED], [0, 1], demonstration) == [UNSOLVED, SOLVED]
    assert buffer.held == []
