import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megapsft.data.sampler import Sampler
from megapsft.errors import Refused


def stream(sampler: Sampler, steps: int) -> np.ndarray:
    return np.concatenate([sampler.indices(step) for step in range(steps)])


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (7, 7), (3, 8), (1, 5), (100, 1)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_holds_every_sample_once(size, batch_size, shuffle):
    taken = stream(Sampler(size, batch_size, seed=3, shuffle=shuffle), steps=3 * size)
    for epoch in taken[: len(taken) // size * size].reshape(-1, size):
        assert sorted(epoch) == list(range(size))


def test_batches_run_across_epochs():
    assert [Sampler(5, 3, 0, shuffle=False).indices(step).tolist() for step in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_a_step_does_not_depend_on_the_steps_before():
    sampler = Sampler(11, 4, seed=7, shuffle=True)
    in_order = [sampler.indices(step).tolist() for step in range(30)]
    for step in np.random.default_rng(0).permutation(30):
        assert sampler.indices(int(step)).tolist() == in_order[step]
        assert Sampler(11, 4, seed=7, shuffle=True).indices(int(step)).tolist() == in_order[step]


def test_the_stream_does_not_depend_on_the_batch_size():
    assert stream(Sampler(11, 4, 7, True), 6).tolist() == stream(Sampler(11, 12, 7, True), 2).tolist()


def test_epochs_and_seeds_are_ordered_differently():
    orders = [stream(Sampler(50, 50, seed, True), 3).reshape(3, 50).tolist() for seed in (1, 2)]
    assert all(a != b for a, b in itertools.combinations(orders[0] + orders[1], 2))


def test_single_draws_are_the_stream_whatever_their_order():
    sampler = Sampler(11, 4, 7, True)
    whole = stream(sampler, 6).tolist()
    assert sampler.draw(3, 0).tolist() == []
    assert [int(sampler.draw(place, 1)[0]) for place in range(23, -1, -1)] == whole[23::-1]


def test_threads_may_draw_at_once():
    sampler = Sampler(3, 1, 7, True)
    expected = [Sampler(3, 1, 7, True).draw(place, 1).tolist() for place in range(300)]
    places = [place for pair in zip(range(150), range(299, 149, -1), strict=True) for place in pair]  # of epochs far apart
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda place: sampler.draw(place, 1).tolist(), places)) == [expected[place] for place in places]


def test_epoch():
    sampler = Sampler(10, 4, 0, True)
    assert [sampler.epoch(step) for step in (0, 1, 5)] == [0.0, 0.4, 2.0]


def test_dtype_and_shape():
    taken = Sampler(10, 4, 0, True).indices(2)
    assert taken.dtype == np.int64
    assert taken.shape == (4,)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"batch_size": 0}, {"seed": -1}])
def test_refused(wrong):
    with pytest.raises(Refused):
        Sampler(**{"size": 3, "batch_size": 2, "seed": 0, "shuffle": True} | wrong)
