"""Parts of a step: seconds that add up, on one thread. Not here: that a GPU is waited for."""

import ast
import threading
import time
from pathlib import Path

import pytest

import megapsft
from megapsft.metrics.names import PARTS
from megapsft.platform.clock import Clock, part


@pytest.fixture
def clock():
    made = Clock()
    made.listen()
    yield made
    Clock().listen()


def test_seconds_of_a_part_add_up_and_are_taken_once(clock):
    began = time.perf_counter()
    for _ in range(3):
        with part("optimizer"):
            time.sleep(0.01)
    whole = time.perf_counter() - began
    taken = clock.take()
    assert taken.keys() == {"optimizer"}
    assert 0.03 <= taken["optimizer"] <= whole
    assert clock.take() == {}


def test_a_part_inside_another_belongs_to_it(clock):
    with part("critic"), part("optimizer"):
        pass
    with part("optimizer"):
        pass
    assert clock.take().keys() == {"critic", "optimizer"}
    with part("critic"), part("optimizer"):
        pass
    assert clock.take().keys() == {"critic"}


def test_what_fails_is_over(clock):
    with pytest.raises(ZeroDivisionError), part("data"):
        1 / 0  # noqa: B018
    with part("checkpoint"):
        pass
    assert clock.take().keys() == {"data", "checkpoint"}


def test_other_threads_are_not_heard(clock):
    def work():
        with part("rollout_wait"):
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert clock.take() == {}


def test_every_part_has_a_name_in_the_metrics():
    """And every name a part in the source."""
    found = set()
    for path in Path(megapsft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "part" and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    assert found == set(PARTS)
