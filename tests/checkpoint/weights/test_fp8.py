"""FP8 in blocks: what comes out of stored values and scales, and what goes in again; any rows give the same as all rows."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megapsft.checkpoint.hf_save import write_config
from megapsft.checkpoint.weights import Stored, rows_of
from megapsft.checkpoint.weights.fp8 import CHUNK_BYTES, FP8, Dequantised, Quantised, linear_weights, quantization_config
from megapsft.checkpoint.weights.hf import HFWeights
from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig

X, SCALES = "x.weight", "x.weight_scale_inv"
SHAPES = [(128, 128), (256, 384), (300, 200), (1, 1), (127, 129), (513, 130)]
DENSE = dict(
    architectures=["Qwen3ForCausalLM"], vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, intermediate_size=48, rms_norm_eps=1e-6, max_position_embeddings=64, rope_theta=1e4,
)  # fmt: skip
SPARSE = DENSE | dict(architectures=["Qwen3MoeForCausalLM"], num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24)


class InMemory:
    """Tensors as Weights; notes the most bytes that were read at once."""

    def __init__(self, content: dict[str, torch.Tensor]):
        self.content, self.most = content, 0
        self.tensors = {name: Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}

    def read(self, name, start, stop, out):
        rows = self.content[name][start:stop]
        assert (out.shape, out.dtype) == (rows.shape, rows.dtype)
        assert out.is_contiguous()
        self.most = max(self.most, rows.nbytes)
        out.copy_(rows)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Numbers of very different size, from block to block and inside of them."""
    numbers = torch.randn(shape, generator=generator(seed))
    return (numbers * 10.0 ** torch.randint(-6, 3, shape, generator=generator(seed + 1))).to(dtype)


def stored(shape, block=(128, 128), seed=0) -> InMemory:
    """Every FP8 value that there is, with scales."""
    codes = torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    scales = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), generator=generator(seed)) * 1e-3
    return InMemory({X: codes.view(FP8), SCALES: scales})


def each_scale(scales: torch.Tensor, shape, block=(128, 128)) -> torch.Tensor:
    """The scale of every number."""
    rows, columns = (torch.arange(size) // by for size, by in zip(shape, block, strict=True))
    return scales[rows][:, columns]


def windows(rows: int):
    """Ranges of rows: all, none of whose ends is an end of a block, and single ones."""
    third = rows // 3
    return {(0, rows), (0, 1), (rows - 1, rows), (third, rows), (third, third + 1), (rows // 5, max(1, rows * 4 // 5))}


class TestDequantised:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_the_product_in_fp32_rounded_once(self, shape, dtype):
        source = stored(shape)
        found = rows_of(Dequantised(source, dtype), X)
        assert torch.equal(found, (source.content[X].float() * each_scale(source.content[SCALES], shape)).to(dtype))

    def test_every_fp8_value(self):
        codes = torch.arange(256, dtype=torch.uint8).view(FP8)
        numbers = codes[~codes.float().isnan()].view(2, -1)
        source = InMemory({X: numbers, SCALES: torch.tensor([[3.0]])})
        assert torch.equal(rows_of(Dequantised(source, torch.float32), X), numbers.float() * 3)

    @pytest.mark.parametrize("code", [0x7F, 0xFF])
    def test_what_is_not_a_number_stays_it_and_spoils_nothing_else(self, code):
        source = stored((200, 130))
        source.content[X].view(torch.uint8)[150, 7] = code
        found = rows_of(Dequantised(source, torch.float32), X)
        assert found.isnan().nonzero().tolist() == [[150, 7]]
        expected = source.content[X].float() * each_scale(source.content[SCALES], (200, 130))
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())

    def test_is_not_what_scales_in_bf16_give(self):
        source = stored((256, 256))
        scales = each_scale(source.content[SCALES], (256, 256))
        found = rows_of(Dequantised(source), X)
        in_bf16 = source.content[X].to(torch.bfloat16) * scales.to(torch.bfloat16)
        assert (found != in_bf16).float().mean() > 0.1
        assert not torch.equal(found, source.content[X].to(torch.bfloat16))  # nor without them

    @pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 128), (1000, 1000)])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_any_rows_are_those_of_the_whole(self, shape, block):
        weights = Dequantised(stored(shape, block), block=block)
        whole = rows_of(weights, X)
        for start, stop in windows(shape[0]):
            assert torch.equal(rows_of(weights, X, start, stop), whole[start:stop])

    def test_blocks_of_another_size(self):
        source = stored((300, 200), (64, 32))
        found = rows_of(Dequantised(source, torch.float32, (64, 32)), X)
        assert torch.equal(found, source.content[X].float() * each_scale(source.content[SCALES], (300, 200), (64, 32)))

    def test_scales_stored_in_bf16_are_taken_for_what_they_are(self):
        source = stored((256, 128))
        source = InMemory({X: source.content[X], SCALES: source.content[SCALES].bfloat16()})
        found = rows_of(Dequantised(source, torch.float32), X)
        assert torch.equal(found, source.content[X].float() * each_scale(source.content[SCALES].float(), (256, 128)))

    def test_other_tensors_pass_and_scales_are_gone(self):
        norm = torch.randn(5, dtype=torch.bfloat16)
        weights = Dequantised(InMemory({"norm": norm, **stored((4, 4)).content}))
        assert weights.tensors == {"norm": Stored((5,), torch.bfloat16), X: Stored((4, 4), torch.bfloat16)}
        assert torch.equal(rows_of(weights, "norm"), norm)

    def test_out_of_files(self, tmp_path):
        source = stored((300, 200))
        save_file(source.content, tmp_path / "model.safetensors")
        files = HFWeights(tmp_path)
        assert torch.equal(rows_of(Dequantised(files), X, 100, 290), rows_of(Dequantised(source), X, 100, 290))
        files.close()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.pop(SCALES), "1 FP8 tensors have no _scale_inv beside them: x.weight"),
            (lambda c: c.pop(X), "1 tensors are scales of something that is not there in FP8: x.weight_scale_inv"),
            (lambda c: c.update({X: c[X].float()}), "scales of something that is not there in FP8: x.weight_scale_inv"),
            (lambda c: c.update({SCALES: c[SCALES][:2]}), r"x.weight_scale_inv: has shape \[2, 2\], but \[300, 200\] in blocks "
                                                          r"of \[128, 128\] makes it \[3, 2\]; mend weight_block_size"),
            (lambda c: c.update({SCALES: c[SCALES].flatten()}), r"x.weight_scale_inv: has shape \[6\], but"),
            (lambda c: c.update({SCALES: c[SCALES].half()}), "x.weight_scale_inv: is stored as torch.float16, not as float32"),
            (lambda c: c.update({X: c[X].view(300, 20, 10)}), r"x.weight: is FP8 of shape \[300, 20, 10\], not a matrix"),
        ],
    )  # fmt: skip
    def test_refused(self, change, message):
        content = stored((300, 200)).content
        change(content)
        with pytest.raises(Refused, match=message):
            Dequantised(InMemory(content))

    @pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
    def test_scales_that_are_no_numbers(self, wrong):
        source = stored((300, 200))
        source.content[SCALES][2, 1] = wrong
        with pytest.raises(Refused, match="x.weight_scale_inv: has 1 scales that are infinite or not a number"):
            rows_of(Dequantised(source), X)


class TestQuantised:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_no_number_is_off_by_more_than_half_a_unit_in_its_last_place(self, shape, dtype):
        source = InMemory({X: matrix(shape, dtype)})
        quantised = Quantised(source, [X])
        scales = each_scale(rows_of(quantised, SCALES), shape)
        off = (rows_of(Dequantised(quantised, torch.float32), X) - source.content[X].float()).abs()
        # of 3 bits after the first, or of 2^-9 where the number is smaller than any with a first one
        assert (off <= torch.maximum(source.content[X].float().abs() / 16, scales / 1024) * (1 + 1e-6)).all()
        for row in range(0, shape[0], 128):
            for column in range(0, shape[1], 128):
                block = slice(row, row + 128), slice(column, column + 128)
                assert off[block].max() <= source.content[X][block].float().abs().max() / 28 * (1 + 1e-6)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_scales_are_the_largest_by_448(self, shape):
        source = InMemory({X: matrix(shape)})
        scales = rows_of(Quantised(source, [X]), SCALES)
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                block = source.content[X][row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
                assert scales[row, column] == block.abs().max() / 448
        assert scales.dtype == torch.float32

    def test_nearest_value_ties_to_even(self):
        numbers = torch.tensor([[448.0, 17.0, 19.0, 18.1, -17.0, 2**-10, 3 * 2**-10, 0.0]])
        found = rows_of(Quantised(InMemory({X: numbers}), [X]), X).float()
        assert found.tolist() == [[448.0, 16.0, 20.0, 18.0, -16.0, 0.0, 2**-8, 0.0]]

    def test_zeros_and_what_is_too_small_for_a_scale(self):
        tiny = torch.zeros(128, 256)
        tiny[3, 130] = 1e-45
        quantised = Quantised(InMemory({X: tiny}), [X])
        assert rows_of(quantised, SCALES).tolist() == [[1.0, 1.0]]
        assert torch.equal(rows_of(quantised, X).float(), torch.zeros(128, 256))

    @pytest.mark.parametrize("largest", [1e-38, 8.8e-43, 3.3e38])  # of the second the scale is rounded by much
    def test_the_largest_saturates_even_at_the_ends_of_fp32(self, largest):
        quantised = Quantised(InMemory({X: torch.tensor([[largest, -largest]])}), [X])
        found = rows_of(quantised, X).float()
        assert found.tolist() == [[448.0, -448.0]]

    @pytest.mark.parametrize("block", [(128, 128), (64, 32)])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_any_rows_are_those_of_the_whole(self, shape, block):
        source = InMemory({X: matrix(shape, torch.bfloat16)})
        whole = Quantised(source, [X], block)
        values, scales = rows_of(whole, X).view(torch.uint8), rows_of(whole, SCALES)
        for start, stop in windows(shape[0]):
            weights = Quantised(source, [X], block)
            assert torch.equal(rows_of(weights, X, start, stop).view(torch.uint8), values[start:stop])
            assert torch.equal(rows_of(weights, SCALES), scales)  # some found along with the values, some not
        for start, stop in windows(scales.shape[0]):
            assert torch.equal(rows_of(Quantised(source, [X], block), SCALES, start, stop), scales[start:stop])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_values_survive_being_dequantised_and_scales_nearly(self, dtype):
        shape = (384, 256)
        first = stored(shape)
        for row in range(0, 384, 128):
            for column in range(0, 256, 128):
                first.content[X].view(torch.uint8)[row + 5, column + 9] = 0x7E  # 448
        again = Quantised(Dequantised(first, dtype), [X])
        assert torch.equal(rows_of(again, X).view(torch.uint8), first.content[X].view(torch.uint8))
        moved = (rows_of(again, SCALES) / first.content[SCALES] - 1).abs().max()
        assert moved <= (2**-8 if dtype == torch.bfloat16 else 2**-23)
        if dtype == torch.bfloat16:
            assert moved > 0  # they are not the same

    def test_values_do_not_survive_where_no_block_reaches_448(self):
        first = InMemory({X: torch.full((128, 128), 240.0).to(FP8), SCALES: torch.tensor([[0.5]])})
        again = Quantised(Dequantised(first, torch.float32), [X])
        assert (rows_of(again, X).float() == 448).all()
        assert torch.equal(rows_of(Dequantised(again, torch.float32), X), torch.full((128, 128), 120.0))

    def test_no_more_is_read_at_once_than_a_few_blocks(self):
        source = InMemory({X: torch.randn(4096, 4096)})
        quantised = Quantised(source, [X])
        rows_of(quantised, SCALES)
        rows_of(quantised, X)
        assert source.content[X].nbytes > 10 * CHUNK_BYTES
        assert source.most <= CHUNK_BYTES

    def test_other_tensors_pass_and_scales_follow_their_weights(self):
        norm = torch.randn(5, dtype=torch.bfloat16)
        weights = Quantised(InMemory({X: matrix((200, 4)), "norm": norm}), [X])
        assert list(weights.tensors.items()) == [
            (X, Stored((200, 4), FP8)), (SCALES, Stored((2, 1), torch.float32)), ("norm", Stored((5,), torch.bfloat16)),
        ]  # fmt: skip
        assert torch.equal(rows_of(weights, "norm"), norm)

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (torch.zeros(3), r"x.weight: is \[3\] of torch.float32, which cannot be quantised in blocks"),
            (torch.zeros(3, 3, dtype=torch.int32), r"x.weight: is \[3, 3\] of torch.int32"),
            (torch.zeros(3, 3).to(FP8), r"x.weight: is \[3, 3\] of torch.float8_e4m3fn"),
        ],
    )
    def test_refused(self, tensor, message):
        with pytest.raises(Refused, match=message):
            Quantised(InMemory({X: tensor}), [X])

    def test_absent(self):
        with pytest.raises(Refused, match="x.weight: are to be quantised, but are not there"):
            Quantised(InMemory({"y": torch.zeros(3)}), [X])

    @pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
    def test_what_is_not_a_number(self, wrong):
        weights = torch.ones(300, 200)
        weights[130, 190] = wrong
        for name in (X, SCALES):
            with pytest.raises(Refused, match="x.weight: has numbers in rows 128 to 256 that are infinite or not a number"):
                rows_of(Quantised(InMemory({X: weights}), [X]), name)


def test_projections_are_quantised_and_nothing_else():
    at = [f"model.layers.{layer}." for layer in range(2)]
    attention = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    dense = [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    sparse = [f"mlp.experts.{expert}.{part}_proj.weight" for expert in range(3) for part in ("gate", "up", "down")]
    for raw, mlp in ((DENSE, dense), (DENSE | dict(architectures=["Qwen2ForCausalLM"]), dense), (SPARSE, sparse)):
        assert linear_weights(HFConfig.parse(raw)) == [layer + name for layer in at for name in (*attention, *mlp)]


def test_config_of_an_export(tmp_path: Path):
    written = quantization_config(HFConfig.parse(SPARSE))
    assert written == dict(
        activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128],
        modules_to_not_convert=["lm_head", *(f"model.layers.{layer}.{name}" for layer in range(2)
                                             for name in ("input_layernorm", "mlp.gate", "post_attention_layernorm"))],
    )  # fmt: skip
    assert not any("gate" in name for name in quantization_config(HFConfig.parse(DENSE))["modules_to_not_convert"])
    write_config(HFConfig.parse(SPARSE), torch.bfloat16, tmp_path, written)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["quantization_config"], raw["torch_dtype"]) == (written, "bfloat16")
    assert HFConfig.parse(raw).fp8_block == (128, 128)


def test_config_of_weights_that_are_fp8_no_more(tmp_path: Path):
    hf = HFConfig.parse(DENSE | dict(quantization_config=quantization_config(HFConfig.parse(DENSE))))
    write_config(hf, torch.bfloat16, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
