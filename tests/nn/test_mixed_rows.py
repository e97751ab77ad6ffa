from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.row_ranges import rows_to_text
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import MixRows
from layerwright.nn import module_from_spec, replace_, structure_of
from layerwright.nn.integer_products import (
    FEW_TOKENS,
    MAGIC_LIMIT,
    grouped_matmul,
    magic_float,
    quantize_token_groups,
    round_token_groups,
)
from layerwright.nn.mixed_rows import MixedRowLinear
from layerwright.nn.quantized import QuantLinear
from layerwright.nn.quantizer import dequantize
from layerwright.nn.replace import rebuild_
from layerwright.nn.treated import logical_parameters
from layerwright.treat.quantize import mix_rows
from stored_samples import normal, relative, state_bytes


def layer(
    rows: dict[int, list[int]],
    out: int = 24,
    in_: int = 96,
    group: int = 32,
    dtype: torch.dtype = torch.float32,
    act_bits: int | None = 8,
    bias: bool = True,
) -> MixedRowLinear:
    treatment = MixRows(4, rows_to_text(rows), group, "rtn", act_bits=act_bits)
    stored, _ = mix_rows(normal(out, in_) + 0.1, treatment, None, 0, dtype)
    return MixedRowLinear.from_stored(stored, normal(out, seed=1) if bias else None, dtype)


def exact(module: MixedRowLinear, x: Tensor) -> Tensor:
    """The product of the rounded input and the stored weight, float64."""
    codes, scale = quantize_token_groups(x, module.group_size)
    grouped = codes.double().view(*scale.shape, x.shape[1] // scale.shape[1]) * scale.double().unsqueeze(-1)
    bias = 0 if module.bias is None else module.bias.double()
    return grouped.flatten(1) @ module.dequantize(torch.float64).t() + bias


@settings(deadline=None, max_examples=30)
@given(
    high=st.sets(st.integers(0, 23)),
    middle=st.sets(st.integers(0, 23)),
    tokens=st.integers(0, 9),
    group=st.sampled_from([1, 8, 32, 96]),
    size=st.sampled_from([0.01, 1.0, 300.0]),
)
def test_integer_products_are_those_of_float64(
    high: set[int], middle: set[int], tokens: int, group: int, size: float
) -> None:
    module = layer({8: sorted(high), 6: sorted(middle - high)}, group=group)
    x = normal(tokens, 96, seed=3) * size
    y, expected = module(x), exact(module, x)
    assert y.shape == (tokens, 24)
    if tokens:
        assert relative(y, expected) < 1e-5


def test_magic_conversion_is_the_cast() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = torch.randint(-MAGIC_LIMIT + 1, MAGIC_LIMIT, (100_000,), generator=generator, dtype=torch.int32)
    ends = torch.tensor(
        [0, 1, -1, 128 * 127 * 15, -128 * 127 * 128, MAGIC_LIMIT - 1, 1 - MAGIC_LIMIT], dtype=torch.int32
    )
    for values in (inside, ends):
        assert torch.equal(magic_float(values), values.to(torch.float32))
    outside = torch.tensor([MAGIC_LIMIT * 2 + 1], dtype=torch.int32)
    assert not torch.equal(magic_float(outside), outside.to(torch.float32))
    with pytest.raises(InputError, match="expected int32"):
        magic_float(inside.float())


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1, 40])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_bfloat16_takes_every_path(tokens: int, act_bits: int | None) -> None:
    module = layer({8: [0, 5, 6, 23]}, dtype=torch.bfloat16, act_bits=act_bits)
    x = normal(tokens, 96, seed=3).bfloat16()
    expected = exact(module, x.float()) if act_bits else x.double() @ module.dequantize(torch.float64).t() + module.bias
    y = module(x)
    assert y.dtype == torch.bfloat16 and relative(y, expected) < 1.5e-2
    assert torch.equal(module(x.view(1, tokens, 96))[0], y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_loaded_copied_and_counted(dtype: torch.dtype) -> None:
    module = layer({8: [1, 2, 20], 5: [0]}, dtype=dtype)
    again = module_from_spec(json.loads(json.dumps(module.spec())))
    again.load_state_dict(module.state_dict())
    x = normal(7, 96, seed=2).to(dtype)
    for other in (again, copy.deepcopy(module)):
        assert torch.equal(other(x), module(x))
    treatment = MixRows(4, "8: 1-2 20; 5: 0", 32)
    assert state_bytes(module) == stored_bytes((treatment,), 24, 96, 1, dtype.itemsize) + 24 * dtype.itemsize
    assert module.average_bits == pytest.approx(8 * stored_bytes((treatment,), 24, 96, 1, dtype.itemsize) / (24 * 96))
    assert logical_parameters(module) == 24 * 96 + 24
    assert {bits: rows.tolist() for bits, rows in module.rows_of().items()}[8] == [1, 2, 20]
    rows = module.read_rows(0, 3, 21, dtype)
    assert torch.equal(rows, module.dequantize()[3:21])


def test_the_two_ways_to_round_agree() -> None:
    x = normal(6, 96, seed=4)
    x[2, :32] = 0
    for group in (8, 32, -1):
        codes, scale = quantize_token_groups(x, group)
        torch.testing.assert_close(round_token_groups(x, group), dequantize(codes, scale, None))
    assert round_token_groups(x.bfloat16(), 32).dtype == torch.bfloat16


def test_one_width_is_the_uniform_layer() -> None:
    for bits, rows in ((4, {}), (8, {8: list(range(24))})):
        module = layer(rows, act_bits=None)
        assert module.place is None and len(module.parts) == 1
        part = module.parts[0]
        assert isinstance(part, QuantLinear) and part.quantize.bits == bits
        assert part.quantize.symmetric == (bits == 8)
        x = normal(3, 96)
        assert module.bias is not None
        torch.testing.assert_close(module(x), part(x) + module.bias)


def test_gradients_pass_to_the_input() -> None:
    module = layer({8: [3]}, bias=False)
    x = normal(4, 96).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, module.dequantize().sum(0).expand(4, 96), rtol=1e-4, atol=1e-4)


def test_in_a_model_and_rebuilt() -> None:
    from layerwright.core.layers import list_layers

    model = nn.Sequential(nn.Linear(96, 24), nn.ReLU(), nn.Linear(24, 96))
    ref = next(ref for ref in list_layers(model) if ref.path == "0")
    stored, _ = mix_rows(model[0].weight.detach(), MixRows(4, "8: 0-3", 32, "rtn"), None, 0)
    before = model[0].weight
    replace_(model, ref, stored)
    assert isinstance(model[0], MixedRowLinear) and before.shape == (24, 96)
    assert list(structure_of(model)) == ["0"]
    other = nn.Sequential(nn.Linear(96, 24), nn.ReLU(), nn.Linear(24, 96))
    rebuild_(other, json.loads(json.dumps(structure_of(model))))
    other.load_state_dict(model.state_dict())
    x = normal(5, 96)
    assert torch.equal(other(x), model(x))
    table = nn.Sequential(nn.Embedding(24, 96))
    (embedding,) = [ref for ref in list_layers(table) if ref.path == "0"]
    with pytest.raises(InputError, match="only the rows of a linear layer"):
        replace_(table, embedding, stored)


def test_bad_sizes() -> None:
    with pytest.raises(InputError, match="do not add up to the 8 outputs"):
        MixedRowLinear(32, 8, {8: 3, 4: 4}, torch.float32, group_size=32)
    with pytest.raises(InputError, match="does not divide the 48 inputs"):
        MixedRowLinear(48, 8, {4: 8}, torch.float32, group_size=32)
    with pytest.raises(InputError, match="expected a whole number"):
        MixedRowLinear(32, 8, {9: 8}, torch.float32, group_size=32)
    codes = torch.zeros(2, 8, dtype=torch.int8)
    with pytest.raises(InputError, match="does not fit"):
        grouped_matmul(codes, torch.ones(2, 2), torch.zeros(3, 9, dtype=torch.int8), torch.ones(3, 2))
    with pytest.raises(InputError, match="x_scale: got 3 groups"):
        grouped_matmul(codes, torch.ones(2, 3), torch.zeros(3, 8, dtype=torch.int8), torch.ones(3, 2))
    with pytest.raises(InputError, match=r"expected \(..., 96\)"):
        layer({})(torch.zeros(1, 95))
