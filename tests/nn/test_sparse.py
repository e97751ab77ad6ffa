from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import Sparsify
from layerwright.nn import SparseConv, SparseLinear, module_from_spec, sparse_weight
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.packing import pack_mask
from layerwright.nn.quantizer import quantize_tokens
from layerwright.nn.sparse_weight import expand_rows
from layerwright.nn.stored import Stored
from stored_samples import DTYPES, normal, quantized, random_mask, relative, sparse, state_bytes

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def sparse_codes(shape: tuple[int, int, int], sparsity: float, *args: object, **kwargs: object) -> Stored:
    return quantized(shape, *args, mask=random_mask(shape, sparsity), **kwargs)  # type: ignore[arg-type]


def reloaded(module: nn.Module) -> nn.Module:
    empty = module_from_spec(json.loads(json.dumps(module.spec())))  # type: ignore[operator]
    empty.load_state_dict(module.state_dict())
    return empty


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 6), columns=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_expansion_puts_values_in_their_places(rows: int, columns: int, share: float, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    values = torch.arange(1, int(mask.sum()) + 1, dtype=torch.float32)
    wanted = torch.zeros(rows, columns).masked_scatter(mask, values)
    assert torch.equal(expand_rows(pack_mask(mask), values, columns), wanted)


@settings(deadline=None, max_examples=80)
@given(
    bits=st.sampled_from([None, 2, 3, 4, 5, 8]),
    out=st.integers(1, 12),
    groups=st.integers(1, 3),
    size=st.sampled_from([3, 8, 16]),
    symmetric=st.booleans(),
    sparsity=st.floats(0.05, 0.95),
    dtype=st.sampled_from(DTYPES),
)
def test_bytes_are_those_that_were_planned(
    bits: int | None, out: int, groups: int, size: int, symmetric: bool, sparsity: float, dtype: torch.dtype
) -> None:
    shape = (1, out, groups * size)
    stored = (
        sparse(shape, sparsity, dtype) if bits is None else sparse_codes(shape, sparsity, bits, size, symmetric, dtype)
    )
    module = SparseLinear.from_stored(stored, None, dtype)
    plan = (Sparsify(sparsity), *(() if stored.quantize is None else (stored.quantize,)))
    assert state_bytes(module) == stored_bytes(plan, out, groups * size, 1, dtype.itemsize)
    assert torch.equal(module.dequantize(), stored.to_dense(dtype)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.5, 0.95])
@pytest.mark.parametrize("bits", [None, 3])
def test_products_of_every_shape(dtype: torch.dtype, sparsity: float, bits: int | None) -> None:
    shape = (1, 40, 160)
    stored = sparse(shape, sparsity, dtype) if bits is None else sparse_codes(shape, sparsity, bits, 32, False, dtype)
    module = SparseLinear.from_stored(stored, normal(40, seed=4), dtype)
    assert module.bias is not None
    for size in ((160,), (0, 160), (1, 160), (2, 3, 160), (2, 1, 9, 160)):
        x = normal(*size, seed=1, dtype=dtype)
        got = module(x)
        assert got.dtype == dtype
        wanted = x.double() @ stored.to_dense(torch.float64)[0].T + module.bias.double()
        assert relative(got, wanted) < TOLERANCE[dtype]


def test_a_compressed_row_copy_only_where_it_is_smaller_than_dense() -> None:
    for sparsity, dtype, copied in [
        (0.5, torch.float32, False),
        (0.75, torch.float32, True),
        (0.75, torch.bfloat16, False),
        (0.9, torch.bfloat16, True),
    ]:
        module = SparseLinear.from_stored(sparse((1, 64, 256), sparsity, dtype), None, dtype)
        module(normal(2, 256, dtype=dtype))
        held = [value for key, value in module._derived.items() if key != "offsets"]
        assert bool(held) == copied
        if held:
            copy_bytes = sum(t.nbytes for t in (held[0].crow_indices(), held[0].col_indices(), held[0].values()))
            assert state_bytes(module) + copy_bytes < 64 * 256 * dtype.itemsize


def test_dense_weight_is_kept_only_if_asked_for() -> None:
    stored = sparse((1, 16, 64), 0.5)
    module = SparseLinear.from_stored(stored, None, torch.float32)
    x = normal(3, 64)
    wanted = module(x)
    assert set(module._derived) <= {"offsets"}
    module.keep_dense = True
    assert torch.allclose(module(x), wanted, atol=1e-6)
    assert torch.equal(module._derived[0], stored.to_dense()[0])
    assert copy.deepcopy(module)._derived == {}
    module.to(torch.float64)
    assert module._derived == {}


def test_rows_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = sparse_codes((1, 30, 48), 0.4, 5, 16, False)
    module = SparseLinear.from_stored(stored, None, torch.float32)
    monkeypatch.setattr(sparse_weight, "_READ_VALUES", 100)
    assert torch.equal(module.dequantize(), stored.to_dense()[0])
    assert torch.equal(module.read_rows(0, 7, 19, torch.float32), stored.to_dense()[0, 7:19])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [None, 4])
def test_round_trips(dtype: torch.dtype, bits: int | None) -> None:
    shape = (1, 12, 64)
    stored = sparse(shape, 0.6, dtype) if bits is None else sparse_codes(shape, 0.6, bits, 32, True, dtype)
    module, x = SparseLinear.from_stored(stored, normal(12), dtype), normal(2, 64, dtype=dtype)
    wanted = module(x)
    assert torch.equal(reloaded(module)(x), wanted)
    assert torch.equal(copy.deepcopy(module)(x), wanted)
    masks = module.weight_mask.clone()
    assert module.to(torch.float32)(x.float()).dtype == torch.float32
    assert torch.equal(module.weight_mask, masks)


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_gradients_reach_the_input(sparsity: float) -> None:
    module = SparseLinear.from_stored(sparse((1, 6, 40), sparsity, torch.float64), normal(6), torch.float64)
    x = normal(3, 40, dtype=torch.float64).requires_grad_()
    y = module(x)
    gradient = normal(3, 6, seed=2, dtype=torch.float64)
    y.backward(gradient)
    assert x.grad is not None
    assert torch.allclose(x.grad, gradient @ module.dequantize(), atol=1e-6)


def test_integer_activations() -> None:
    stored = sparse_codes((1, 8, 32), 0.5, 8, act_bits=8)
    x = normal(4, 32)
    codes, scale = quantize_tokens(x)
    module = SparseLinear.from_stored(stored, None, torch.float32)
    assert torch.allclose(module(x), (codes * scale) @ stored.to_dense()[0].T, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 4])
def test_convolution(bits: int | None) -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2)
    shape = (1, 6, 18)
    stored = sparse(shape, 0.5) if bits is None else sparse_codes(shape, 0.5, bits, -1, False)
    conv.weight = nn.Parameter(stored.to_dense()[0].view_as(conv.weight))
    module = SparseConv.from_stored(stored, conv.bias, torch.float32, ConvSettings.of(conv))
    x = normal(2, 4, 6, 6)
    assert torch.equal(module.weight, conv.weight)
    assert torch.allclose(module(x), conv(x), atol=1e-6)
    assert torch.equal(reloaded(module)(x), module(x))
    plan = (Sparsify(0.5), *(() if stored.quantize is None else (stored.quantize,)))
    assert state_bytes(module) == stored_bytes(plan, 6, 18, 1, 4) + 6 * 4


def test_what_is_not_sparse_is_refused() -> None:
    dense = Stored((1, 4, 8), dense=normal(1, 4, 8))
    with pytest.raises(InputError, match="mask"):
        SparseLinear.from_stored(dense, None, torch.float32)
    masked = sparse((1, 4, 8), 0.5)
    with pytest.raises(InputError, match="dense"):
        SparseLinear.from_stored(dataclasses.replace(masked, dense=None), None, torch.float32)


def test_a_pruned_weight_is_zero_whatever_the_zero_point() -> None:
    stored = sparse_codes((1, 5, 24), 0.5, 4, 8, False)
    assert stored.mask is not None
    assert stored.zero is not None
    assert bool((stored.zero != 0).any())
    dense: Tensor = SparseLinear.from_stored(stored, None, torch.float32).dequantize()
    assert bool((dense[~stored.mask[0]] == 0).all())
