"""Every rule there and back, bit by bit, and the layout it gives to Megatron."""

import pytest
import torch

from megapsft.models.parameters import QKV, GatedMLP, Replicated, RowParallel, Vocab, expand, gather, parameter_count

RULES = [
    (Replicated(name="n", hf="norm", shape=(8,)), lambda tp: (8,)),
    (RowParallel(name="n", hf="o", shape=(6, 16)), lambda tp: (6, 16 // tp)),
    (GatedMLP(name="n", hf="{part}", shape=(12, 5)), lambda tp: (24 // tp, 5)),
    (QKV(name="n", hf="{part}", shape=(24, 5), groups=4, head_dim=3), lambda tp: (48 // tp, 5)),
    (QKV(name="n", hf="{part}", shape=(24,), groups=4, head_dim=3), lambda tp: (48 // tp,)),
    (Vocab(name="n", hf="e", shape=(13, 4)), lambda tp: (16 // tp, 4)),
    (Vocab(name="n", hf="e", shape=(5, 4)), lambda tp: (16 // tp, 4)),  # whole shards of padding
]


def tensors(rule) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in rule.sources.items()}


def export(rule, shards: list[torch.Tensor], window: int) -> dict[str, torch.Tensor]:
    """The tensors of a rule out of all shards, some rows at a time."""
    boxes, places = [], []
    for rank, shard in enumerate(shards[:1] if rule.axis is None else shards):
        at = 0
        for box in rule.boxes(rank, len(shards), tuple(shard.shape)):
            boxes.append(box)
            places.append(shard[at : at + box.rows])
            at += box.rows

    def fill(number, first, last, into):
        row = boxes[number].row
        into.copy_(places[number][first - row : last - row].reshape(into.shape))

    found = {name: torch.full(shape, float("nan")) for name, shape in rule.sources.items()}
    for name, tensor in found.items():
        for start in range(0, len(tensor), window):
            gather(rule.blocks(), name, start, boxes, fill, tensor[start : start + window])
    return found


@pytest.mark.parametrize("window", [3, 100])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("rule", "shard_shape"), RULES, ids=lambda value: type(value).__name__)
def test_gather_undoes_load(rule, shard_shape, tp, window):
    source = tensors(rule)
    shape = shard_shape(tp)
    shards = [rule.load(lambda name, index: source[name][index], rank, tp, shape) for rank in range(tp)]
    assert [tuple(shard.shape) for shard in shards] == [shape] * tp
    back = export(rule, shards, window)
    assert list(back) == list(source)
    assert all(torch.equal(tensor, source[name]) for name, tensor in back.items())


@pytest.mark.parametrize(("rule", "shard_shape"), RULES, ids=lambda value: type(value).__name__)
def test_blocks_are_all_rows_of_the_parameter_and_of_its_tensors(rule, shard_shape):
    blocks = rule.blocks()
    assert [block.row for block in blocks] == [sum(b.rows for b in blocks[:number]) for number in range(len(blocks))]
    for name, shape in rule.sources.items():
        mine = [(block.start, block.rows) for block in blocks if block.hf == name]
        assert [start for start, _ in mine] == [sum(rows for _, rows in mine[:number]) for number in range(len(mine))]
        assert sum(rows for _, rows in mine) == shape[0]
    assert rule.whole == shard_shape(1) or rule.padded


@pytest.mark.parametrize(("rule", "shard_shape"), RULES, ids=lambda value: type(value).__name__)
def test_a_rank_reads_no_more_than_its_share(rule, shard_shape):
    source, asked = tensors(rule), []

    def read(name, index):
        asked.append(source[name][index].numel())
        return source[name][index]

    shard = rule.load(read, 0, 4, shard_shape(4))
    assert sum(asked) <= shard.numel()


def test_qkv_has_for_each_group_its_queries_its_key_its_value():
    rule = QKV(name="n", hf="{part}", shape=(8,), groups=2, head_dim=2)
    source = dict(q=torch.arange(8), k=torch.arange(10, 14), v=torch.arange(20, 24))
    shard = rule.load(lambda name, index: source[name][index], 0, 1, (16,))
    assert shard.tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]


def test_gated_mlp_has_on_each_rank_gate_then_up():
    rule = GatedMLP(name="n", hf="{part}", shape=(4,))
    source = dict(gate=torch.arange(4), up=torch.arange(10, 14))
    assert rule.load(lambda name, index: source[name][index], 1, 2, (4,)).tolist() == [2, 3, 12, 13]


def test_vocabulary_is_padded_with_zeros():
    rule = Vocab(name="n", hf="e", shape=(3, 1))
    source = torch.ones(3, 1)
    assert rule.load(lambda name, index: source[index], 1, 2, (2, 1)).tolist() == [[1], [0]]


def test_expand_goes_layer_by_layer_and_expert_by_expert():
    table = [
        Replicated(name="first", hf="a", shape=(1,)),
        Replicated(name="{layer}.norm", hf="l{layer}.n", shape=(1,)),
        Replicated(name="{layer}.{expert}.up", hf="l{layer}.e{expert}.u", shape=(2,)),
        Replicated(name="{layer}.{expert}.down", hf="l{layer}.e{expert}.d", shape=(3,)),
        Replicated(name="last", hf="z", shape=(1,)),
    ]
    rules = expand(table, num_layers=2, num_experts=2)
    layer = ["{}.norm", "{}.0.up", "{}.0.down", "{}.1.up", "{}.1.down"]
    names = [name.format(number) for number in range(2) for name in layer]
    assert [rule.name for rule in rules] == ["first", *names, "last"]
    assert rules[-2].hf == "l1.e1.d"
    assert parameter_count(rules) == 1 + 2 * (1 + 2 * (2 + 3)) + 1
