"""Histograms and the packing of an epoch, on lengths whose figures are known."""

import pytest

from megapsft.audit.lengths import histogram, packing
from megapsft.config import load_config
from megapsft.data.pack import pack
from megapsft.data.plan import Layout
from megapsft.data.sampler import Sampler
from megapsft.train.sources import load_dataset
from tests.audit.conftest import LAYOUT, VOCABULARY


def test_a_histogram():
    made = histogram("response", [0, 1, 5, 47, 47, 48], {"data.max_length": 40})
    assert (made.minimum, made.median, made.maximum) == (0, 26, 48)
    assert made.edges == tuple(range(0, 52, 3))  # at most 24 bars, equally wide, of whole tokens
    assert made.counts == (2, 1, *[0] * 13, 2, 1)
    assert made.limits == {"data.max_length": 40}
    assert histogram("prompt", [], {}) is None


def test_unpacked_rows_are_padded_to_the_longest():
    config = load_config(None, ["train.batch_size=2", "data.shuffle=false", "data.packing=false"])
    layout = Layout(packing=False, pack_length=1, micro_batch_size=2)
    made = packing([[(10, 4)], [(6, 2)], [(8, 8)], [(8, 1)]], config, layout)
    assert (made.updates, made.of_updates, made.microbatches) == (2, 2, 2)
    assert (made.positions, made.tokens, made.trained, made.longest) == (20 + 16, 32, 15, 10)
    assert made.unpacked_positions == 20 + 16
    assert made.worst == 16 / 20


@pytest.mark.parametrize("layout", [LAYOUT, Layout(packing=True, pack_length=400, micro_batch_size=1, data_parallel_size=3)])
def test_packing_is_what_training_packs(layout, clean, config_of, template):
    config = config_of(clean)
    groups = load_dataset(config, template, VOCABULARY).groups
    made = packing([[(len(s), int(s.loss_mask.sum())) for s in group] for group in groups], config, layout)
    order = Sampler(len(groups), 16, config.train.seed, True).draw(0, len(groups))
    batch = pack([groups[i] for i in order], minibatch_size=8, layout=layout, aggregation="token-mean", pad_token_id=0)
    assert made.updates == made.of_updates == len(batch.minibatches) == 5
    assert made.positions == sum(minibatch.forward_tokens for minibatch in batch.minibatches)
    assert made.tokens == sum(minibatch.real_tokens for minibatch in batch.minibatches)
    assert made.trained == sum(minibatch.trained_tokens for minibatch in batch.minibatches)
    assert packing([], config, layout) is None


def test_of_a_long_epoch_some_updates_are_packed():
    config = load_config(None, ["train.batch_size=1"])
    made = packing([[(5, 1)]] * 1000, config, LAYOUT)
    assert (made.updates, made.of_updates, made.filled) == (200, 1000, 1.0)
