from __future__ import annotations

import copy
import io
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import Quantize
from layerwright.nn import QuantConv, QuantEmbedding, QuantLinear, module_from_spec, treated
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.quantized_weight import scaled_codes
from layerwright.nn.quantizer import dequantize, quantize_tokens
from stored_samples import DTYPES, normal, quantized, relative, state_bytes

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
"""Relative to a float64 product: rounding of the dense weight and of the result (2**-9 each in bfloat16)."""


def reloaded(module: nn.Module) -> nn.Module:
    """The module after a state dict and a JSON spec, nothing else."""
    empty = module_from_spec(json.loads(json.dumps(module.spec())))  # type: ignore[operator]
    empty.load_state_dict(module.state_dict())
    return empty


@settings(deadline=None, max_examples=80)
@given(
    bits=st.integers(2, 8),
    out=st.integers(1, 20),
    groups=st.integers(1, 4),
    size=st.sampled_from([1, 3, 8, 32]),
    per_row=st.booleans(),
    symmetric=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_bytes_are_those_that_were_planned(
    bits: int, out: int, groups: int, size: int, per_row: bool, symmetric: bool, bias: bool, dtype: torch.dtype
) -> None:
    group_size = -1 if per_row else size
    stored = quantized((1, out, groups * size), bits, group_size, symmetric, dtype)
    module = QuantLinear.from_stored(stored, torch.zeros(out) if bias else None, dtype)
    assert stored.quantize is not None
    planned = stored_bytes((stored.quantize,), out, groups * size, 1, dtype.itemsize)
    assert state_bytes(module) == planned + (out * dtype.itemsize if bias else 0)
    assert torch.equal(module.dequantize(), stored.to_dense(dtype)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 32, True), (3, -1, False), (8, -1, True), (6, 16, False)]
)
def test_products_of_every_shape(dtype: torch.dtype, bits: int, group_size: int, symmetric: bool) -> None:
    stored = quantized((1, 24, 96), bits, group_size, symmetric, dtype)
    module = QuantLinear.from_stored(stored, normal(24, seed=5), dtype)
    assert module.bias is not None
    for shape in ((96,), (0, 96), (2, 0, 96), (5, 96), (2, 3, 96), (2, 3, 50, 96)):
        x = normal(*shape, seed=1, dtype=dtype)
        wanted = x.double() @ stored.to_dense(torch.float64)[0].T + module.bias.double()
        got = module(x)
        assert got.dtype == dtype
        assert relative(got, wanted) < TOLERANCE[dtype]


def test_pieces_of_the_dense_weight_join(monkeypatch: pytest.MonkeyPatch) -> None:
    module = QuantLinear.from_stored(quantized((1, 24, 96), 5, 32), normal(24), torch.float32)
    x, gradient = normal(3, 96), normal(3, 24, seed=2)
    whole, back = module(x), module.multiply_back(gradient, 0)
    monkeypatch.setattr(treated, "DENSE_CHUNK_BYTES", 5 * 96 * 4)
    assert torch.allclose(module(x), whole, atol=1e-6)
    assert torch.allclose(module.multiply_back(gradient, 0), back, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fast_numbers_are_the_quantizer_s(dtype: torch.dtype, symmetric: bool, bits: int) -> None:
    stored = quantized((1, 8, 64), bits, 16, symmetric, dtype)
    assert stored.codes is not None
    assert stored.scale is not None
    zero = None if stored.zero is None else stored.zero[0]
    for wanted in (dtype, torch.float32):
        out = torch.empty(8, 64, dtype=wanted)
        scaled_codes(stored.codes[0], stored.scale[0], zero, out)
        assert torch.equal(out, dequantize(stored.codes[0], stored.scale[0], zero, wanted))


MODULES = {
    "linear": lambda dtype: QuantLinear.from_stored(quantized((1, 16, 64), 4, 32, False, dtype), normal(16), dtype),
    "w8a8": lambda dtype: QuantLinear.from_stored(quantized((1, 16, 64), 8, act_bits=8, dtype=dtype), None, dtype),
    "w8a8 static": lambda dtype: QuantLinear.from_stored(
        quantized((1, 16, 64), 8, act_bits=8, input_scale=0.03, dtype=dtype), normal(16), dtype
    ),
    "conv": lambda dtype: QuantConv.from_stored(
        quantized((1, 6, 18), 3, dtype=dtype), normal(6), dtype, ConvSettings.of(nn.Conv2d(4, 6, 3, groups=2))
    ),
    "embedding": lambda dtype: QuantEmbedding.from_stored(
        quantized((1, 10, 32), 4, 16, dtype=dtype), dtype, padding_idx=3, multiplier=2.5
    ),
}
INPUTS = {"conv": lambda: normal(2, 4, 5, 5), "embedding": lambda: torch.tensor([[1, 2], [3, 9]])}


def module_and_input(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    x = INPUTS.get(name, lambda: normal(3, 64))()
    return MODULES[name](dtype), x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize(("name", "dtype"), itertools.product(MODULES, DTYPES))
def test_round_trips(name: str, dtype: torch.dtype) -> None:
    module, x = module_and_input(name, dtype)
    wanted = module(x)
    assert not list(module.parameters())
    for other in (reloaded(module), copy.deepcopy(module)):
        assert torch.equal(other(x), wanted)
    with torch.device("meta"):
        empty = module_from_spec(module.spec())  # type: ignore[operator]
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x), wanted)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), wanted)


@pytest.mark.parametrize("name", MODULES)
def test_a_new_dtype_moves_scales_and_not_codes(name: str) -> None:
    module, x = module_and_input(name, torch.bfloat16)
    module(x)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items() if not tensor.is_floating_point()}
    module.to(torch.float32)
    wide = x.float() if x.is_floating_point() else x
    assert module(wide).dtype == torch.float32
    after = module.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert after["weight_scale"].dtype == torch.float32


def test_loading_drops_what_was_derived() -> None:
    one = QuantLinear.from_stored(quantized((1, 32, 64), 4, 32, dtype=torch.bfloat16), None, torch.bfloat16)
    other = QuantLinear.from_stored(quantized((1, 32, 64), 4, 32, dtype=torch.bfloat16, seed=7), None, torch.bfloat16)
    x = normal(2, 64, dtype=torch.bfloat16)
    assert not torch.equal(one(x), other(x))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))


def test_nothing_dense_stays() -> None:
    module = QuantLinear.from_stored(quantized((1, 64, 256), 4, 32, dtype=torch.bfloat16), None, torch.bfloat16)
    for rows in (1, 400):
        module(normal(rows, 256, dtype=torch.bfloat16))
    held = state_bytes(module) + sum(kernel.nbytes for kernel in module._kernels.values() if kernel is not None)
    assert held <= 64 * 256 + 2 * 64 * 8 * 2 * 2
    assert copy.deepcopy(module)._kernels == {}


def test_gradients_reach_the_input() -> None:
    for seed, (bits, group_size, symmetric) in enumerate([(4, 8, True), (8, -1, False)]):
        module = QuantLinear.from_stored(
            quantized((1, 6, 32), bits, group_size, symmetric, torch.float64, seed=seed), normal(6), torch.float64
        )
        x = normal(2, 3, 32, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(module, x)
        assert torch.autograd.gradgradcheck(module, x)


@pytest.mark.parametrize("rows", [2, 300])
def test_gradients_in_bfloat16(rows: int) -> None:
    stored = quantized((1, 32, 64), 4, 32, dtype=torch.bfloat16)
    module = QuantLinear.from_stored(stored, None, torch.bfloat16)
    x = normal(rows, 64, dtype=torch.bfloat16).requires_grad_()
    gradient = normal(rows, 32, seed=3, dtype=torch.bfloat16)
    module(x).backward(gradient)
    assert x.grad is not None
    assert relative(x.grad, gradient.double() @ stored.to_dense(torch.float64)[0]) < TOLERANCE[torch.bfloat16]


def test_a_low_rank_update_trains_on_top() -> None:
    module = QuantLinear.from_stored(quantized((1, 8, 16), 4), None, torch.float32)
    down, up = nn.Linear(16, 2, bias=False), nn.Linear(2, 8, bias=False)
    first = nn.Linear(16, 16)
    x = normal(4, 16)
    hidden = first(x)
    (module(hidden) + up(down(hidden))).square().sum().backward()
    assert all(p.grad is not None for m in (down, up, first) for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_integer_activations(dtype: torch.dtype, rows: int) -> None:
    stored = quantized((1, 24, 100), 8, act_bits=8, dtype=dtype)
    module = QuantLinear.from_stored(stored, normal(24), dtype)
    assert set(module.state_dict()) == {"weight", "weight_scale", "bias"}
    assert module.state_dict()["weight"].dtype == torch.int8
    x = normal(rows, 100, seed=rows, dtype=dtype)
    codes, scale = quantize_tokens(x)
    assert module.bias is not None
    wanted = (codes.double() * scale.double()) @ stored.to_dense(torch.float64)[0].T + module.bias.double()
    assert relative(module(x), wanted) < (1e-6 if dtype == torch.float32 else TOLERANCE[dtype])


def test_static_activations_use_their_range() -> None:
    stored = quantized((1, 8, 16), 8, act_bits=8, input_scale=0.5)
    module = QuantLinear.from_stored(stored, None, torch.float32)
    x = torch.tensor([[0.1, 0.3, 100.0, -100.0] * 4]).requires_grad_()
    rounded = torch.tensor([[0.0, 0.5, 63.5, -64.0] * 4])
    y = module(x)
    assert torch.allclose(y, rounded @ stored.to_dense()[0].T, atol=1e-4)
    y.sum().backward()
    assert x.grad is not None
    inside = torch.tensor([1.0, 1.0, 0.0, 0.0] * 4)
    assert torch.allclose(x.grad[0], stored.to_dense()[0].sum(0) * inside, atol=1e-4)


def test_weight_looks_like_a_tensor() -> None:
    stored = quantized((1, 8, 32), 4, 16)
    module = QuantLinear.from_stored(stored, None, torch.float32)
    dense, x = stored.to_dense()[0], normal(3, 32)
    weight = module.weight
    assert (weight.shape, weight.dtype, weight.device, weight.ndim) == (dense.shape, dense.dtype, dense.device, 2)
    assert not weight.requires_grad
    assert torch.equal(weight, dense)
    assert torch.equal(weight + 0, dense)
    assert type(weight[0]) is Tensor
    assert torch.equal(weight.t(), dense.t())
    assert torch.equal(copy.deepcopy(weight), dense)
    assert torch.equal(torch.nn.functional.linear(x, weight), module(x))
    assert torch.equal(torch.nn.functional.linear(x, weight=weight, bias=None), module(x))
    assert "QuantLinear" in repr(weight)


def test_reading_shape_and_dtype_reads_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    module = QuantLinear.from_stored(quantized((1, 8, 32), 4, 16), None, torch.float32)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("a row was read")

    monkeypatch.setattr(QuantLinear, "read_rows", refuse)
    assert module.weight.dtype == torch.float32
    assert module.weight.shape == (8, 32)
    assert module.weight.device == torch.device("cpu")
    assert module.weight.numel() == 256
    with pytest.raises(AssertionError):
        module.weight.sum()


def test_attention_that_reads_the_weight_itself() -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    stored = quantized((1, 16, 16), 4)
    x = normal(2, 3, 16)
    with torch.no_grad():
        attention.out_proj.weight.copy_(stored.to_dense()[0])
        wanted, _ = attention(x, x, x)
        bias = attention.out_proj.bias
        attention.out_proj = QuantLinear.from_stored(stored, bias, torch.float32)  # type: ignore[assignment]
        assert torch.allclose(attention(x, x, x)[0], wanted, atol=1e-6)


def test_autocast() -> None:
    module = QuantLinear.from_stored(quantized((1, 32, 64), 4, 32), None, torch.float32)
    x = normal(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        assert relative(module(x), x.double() @ module.dequantize(torch.float64).T) < 1e-2


def test_wrong_inputs() -> None:
    module = QuantLinear.from_stored(quantized((1, 8, 32), 4), None, torch.float32)
    with pytest.raises(InputError, match=r"expected \(..., 32\)"):
        module(normal(2, 64))
    with pytest.raises(InputError, match="one matrix"):
        QuantLinear.from_stored(quantized((2, 8, 32), 4), None, torch.float32)
    with pytest.raises(InputError, match="divide"):
        QuantLinear(30, 8, Quantize(4, 32), torch.float32, bias=False)
    with pytest.raises(InputError, match="dtype"):
        module_from_spec(module.spec() | {"dtype": "int8"})


CONVS = [
    nn.Conv1d(6, 4, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, 3, groups=2, padding=(1, 0), bias=False),
    nn.Conv2d(4, 8, (3, 2), dilation=(1, 2), padding=2, padding_mode="reflect"),
    nn.Conv2d(4, 4, 4, padding="same", padding_mode="circular"),
    nn.Conv2d(4, 4, 3, padding="same", groups=4),
    nn.Conv1d(6, 4, 3, padding="valid", padding_mode="replicate"),
    nn.Conv3d(2, 4, 2, stride=(1, 2, 1)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("bits", [3, 8])
def test_convolutions(conv: nn.Conv2d, bits: int) -> None:
    stored = quantized((1, conv.out_channels, conv.weight[0].numel()), bits, symmetric=False)
    conv = copy.deepcopy(conv)
    conv.weight = nn.Parameter(stored.to_dense()[0].view_as(conv.weight))
    module = QuantConv.from_stored(stored, conv.bias, torch.float32, ConvSettings.of(conv))
    size = (7, 6, 5)[: len(conv.kernel_size)]
    for shape in ((2, conv.in_channels, *size), (conv.in_channels, *size)):
        x = normal(*shape).requires_grad_()
        y = module(x)
        wanted = conv(x)
        assert torch.allclose(y, wanted, atol=1e-6)
        (got,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.allclose(got, torch.autograd.grad(wanted.square().sum(), x)[0], atol=1e-4)
    assert torch.equal(module.weight, conv.weight)
    assert torch.equal(reloaded(module)(x), y)


def test_convolution_with_integer_activations() -> None:
    conv = nn.Conv2d(3, 4, 3, bias=False)
    stored = quantized((1, 4, 27), 8, act_bits=8)
    module = QuantConv.from_stored(stored, None, torch.float32, ConvSettings.of(conv))
    x = normal(2, 3, 5, 5).requires_grad_()
    codes, scale = quantize_tokens(x.detach().flatten(1))
    rounded = (codes * scale).view_as(x)
    y = module(x)
    assert torch.allclose(y, nn.functional.conv2d(rounded, module.weight), atol=1e-5)
    assert torch.autograd.grad(y.sum(), x)[0].abs().sum() > 0


def test_transposed_convolutions_are_refused() -> None:
    with pytest.raises(InputError, match="ConvTranspose2d"):
        ConvSettings.of(nn.ConvTranspose2d(3, 4, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_embedding_looks_up_rows(dtype: torch.dtype, symmetric: bool) -> None:
    stored = quantized((1, 11, 24), 3, 8, symmetric, dtype)
    module = QuantEmbedding.from_stored(stored, dtype)
    assert stored.quantize is not None
    assert state_bytes(module) == stored_bytes((stored.quantize,), 11, 24, 1, dtype.itemsize)
    table = stored.to_dense(dtype)[0]
    for ids in (torch.tensor([[0, 10, 3], [3, 3, 1]]), torch.tensor(5), torch.empty(0, 2, dtype=torch.long)):
        assert torch.equal(module(ids), table[ids])
    assert torch.equal(module.weight, table)
    with pytest.raises(IndexError):
        module(torch.tensor([11]))


def test_embedding_reads_only_what_it_looks_up(monkeypatch: pytest.MonkeyPatch) -> None:
    module = QuantEmbedding.from_stored(quantized((1, 1000, 8), 4), torch.float32)
    seen: list[int] = []
    original = scaled_codes

    def watch(codes: Tensor, *rest: object) -> None:
        seen.append(codes.shape[0])
        original(codes, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("layerwright.nn.quantized.scaled_codes", watch)
    module(torch.tensor([1, 999]))
    assert seen == [2]
