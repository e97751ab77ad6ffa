from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.nn.quantizer import (
    dequantize,
    fake_quantize,
    find_scale,
    grid,
    lsq_gradient_scale,
    mse_clip,
    quantize,
    quantize_tokens,
    range_scale,
)
from oracles.lattice import best_clip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cases() -> st.SearchStrategy[tuple[Tensor, int, int, bool, torch.dtype]]:
    def build(
        rows: int, groups: int, size: int, bits: int, symmetric: bool, dtype: torch.dtype, exponent: int, seed: int
    ) -> tuple[Tensor, int, int, bool, torch.dtype]:
        x = normal(rows, groups * size, seed=seed) * 10.0**exponent + 0.3 * (seed % 3) * 10.0**exponent
        return x, bits, size, symmetric, dtype

    return st.builds(
        build,
        rows=st.integers(1, 4),
        groups=st.integers(1, 4),
        size=st.integers(2, 9),
        bits=st.integers(2, 8),
        symmetric=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        exponent=st.integers(-2, 2),
        seed=st.integers(0, 1000),
    )


@settings(max_examples=80, deadline=None)
@given(cases())
def test_codes_are_nearest_and_idempotent(case: tuple[Tensor, int, int, bool, torch.dtype]) -> None:
    x, bits, size, symmetric, dtype = case
    scale, zero = find_scale(x, bits, size, symmetric, scale_dtype=dtype)
    assert scale.dtype == dtype
    assert scale.shape == (len(x), x.shape[1] // size)
    codes = quantize(x, scale, zero, bits)
    qmin, qmax = grid(bits)
    assert codes.dtype == torch.int8
    assert int(codes.min()) >= qmin
    assert int(codes.max()) <= qmax
    back = dequantize(codes, scale, zero)
    assert torch.equal(fake_quantize(x, scale, zero, bits), back)

    step = scale.float().repeat_interleave(size, 1)
    shift = torch.zeros_like(step) if zero is None else zero.float().repeat_interleave(size, 1)
    inside = (x >= (qmin - shift) * step) & (x <= (qmax - shift) * step)
    error = (x - back).abs()
    assert bool((error <= step / 2 * (1 + 1e-5))[inside].all())
    # A scale of all values leaves little outside: half a step of the range, and what rounding the scale takes away.
    assert bool((error <= 1.05 * step + x.abs() * torch.finfo(dtype).eps).all())
    assert torch.equal(quantize(back, scale, zero, bits), codes)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_zero_is_exact(case: tuple[Tensor, int, int, bool, torch.dtype]) -> None:
    x, bits, size, symmetric, dtype = case
    x = x.clone()
    x[:, 0] = 0
    scale, zero = find_scale(x, bits, size, symmetric, scale_dtype=dtype)
    assert bool((fake_quantize(x, scale, zero, bits)[:, 0] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.75, -1.5, 2.0**-20, -(2.0**-20)])
def test_constant_groups_come_back_exactly(symmetric: bool, dtype: torch.dtype, value: float) -> None:
    x = normal(2, 12)
    x[0, 4:8] = value
    scale, zero = find_scale(x, 4, 4, symmetric, scale_dtype=dtype)
    back = fake_quantize(x, scale, zero, 4)
    assert torch.equal(back[0, 4:8], x[0, 4:8])
    assert bool((scale > 0).all())


def test_extreme_values_stay_finite() -> None:
    x = torch.tensor([[1e9, -3e8, 0.0, 5.0], [1e-30, -1e-31, 0.0, 1e-30]])
    for symmetric in (True, False):
        scale, zero = find_scale(x, 4, symmetric=symmetric, scale_dtype=torch.float16)
        assert bool(scale.isfinite().all())
        assert bool((scale > 0).all())
        assert bool(fake_quantize(x, scale, zero, 4).isfinite().all())


def test_whole_row_as_group_is_per_channel_and_flat_is_per_tensor() -> None:
    x = normal(3, 8)
    for symmetric in (True, False):
        a, b = (find_scale(x, 4, size, symmetric) for size in (8, -1))
        assert torch.equal(a[0], b[0])
    per_tensor, _ = find_scale(x.flatten(), 8)
    assert per_tensor.shape == (1,)
    assert torch.equal(fake_quantize(x, per_tensor, None, 8).flatten(), fake_quantize(x.flatten(), per_tensor, None, 8))


def test_scales_by_hand() -> None:
    x = torch.tensor([[-3.0, 1.5, 0.5, 0.0]])
    assert find_scale(x, 4)[0].item() == pytest.approx(3 / 7.5)
    assert find_scale(x, 4, full_range=True)[0].item() == pytest.approx(3 / 7)
    scale, zero = find_scale(x, 4, symmetric=False)
    assert scale.item() == pytest.approx(4.5 / 15)
    assert zero is not None
    assert zero.item() == -8 + 10
    # All positive: the range is extended to zero, so that zero stays exact.
    scale, zero = find_scale(torch.tensor([[2.0, 6.0]]), 2, symmetric=False)
    assert (scale.item(), zero.item() if zero is not None else None) == (2.0, -2)
    # Half to even.
    assert quantize(torch.tensor([0.5, 1.5, 2.5, -0.5]), torch.tensor([1.0]), None, 4).tolist() == [0, 2, 2, 0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([4, 16, -1]))
def test_error_falls_with_bits(seed: int, symmetric: bool, size: int) -> None:
    x = normal(8, 64, seed=seed)
    errors = []
    for bits in range(2, 9):
        scale, zero = find_scale(x, bits, size, symmetric)
        errors.append(float((fake_quantize(x, scale, zero, bits) - x).square().sum()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = normal(4, 32, dtype=dtype)
    scale, zero = find_scale(x, 4, 8, False, scale_dtype=dtype)
    wide, _ = find_scale(x.float(), 4, 8, False, scale_dtype=dtype)
    assert torch.equal(scale, wide)
    assert torch.equal(quantize(x, scale, zero, 4), quantize(x.float(), scale, zero, 4))
    rounded = fake_quantize(x, scale, zero, 4)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, dequantize(quantize(x, scale, zero, 4), scale, zero, dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_against_finite_differences(symmetric: bool) -> None:
    # Held codes make the forward smooth: away from kinks, the slope in the scale is that of (code - zero) * scale
    # plus, straight through, that of scale * (x / scale), which finite differences of the surrogate below measure.
    bits, size = 3, 4
    x = normal(3, 8).double() * 1.3
    scale, zero = find_scale(x.float(), bits, size, symmetric, clip=0.6)
    scale = scale.double()
    qmin, qmax = grid(bits)
    shift = torch.zeros_like(scale) if zero is None else zero.double()
    ratio = (x.view(3, 2, 4) / scale.unsqueeze(-1)).detach()
    offset = ratio.round() - ratio
    upstream = normal(3, 8, seed=5).double()

    def surrogate(x: Tensor, scale: Tensor) -> Tensor:
        code = x.view(3, 2, 4) / scale.unsqueeze(-1) + offset + shift.unsqueeze(-1)
        value = (code.clamp(qmin, qmax) - shift.unsqueeze(-1)) * scale.unsqueeze(-1)
        return (value.reshape(3, 8) * upstream).sum()

    code = ratio + offset + shift.unsqueeze(-1)
    assert bool(((code - qmin).abs() > 0).any())
    a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
    out = fake_quantize(a, s, zero, bits, scale_gradient=1.0)
    (out * upstream).sum().backward()
    assert a.grad is not None
    assert s.grad is not None
    step = 1e-6
    for index in range(x.numel()):
        delta = torch.zeros(24, dtype=torch.float64)
        delta[index] = step
        delta = delta.view(3, 8)
        # A code that sits on the end of the grid has a kink there; the clamp's gradient is kept on the grid.
        at_end = bool((code.flatten()[index] == qmin) | (code.flatten()[index] == qmax))
        if at_end:
            continue
        slope = (surrogate(x + delta, scale) - surrogate(x - delta, scale)) / (2 * step)
        assert a.grad.flatten()[index].item() == pytest.approx(slope.item(), abs=1e-6)
    on_end = (code == qmin) | (code == qmax)
    for row in range(3):
        for group in range(2):
            if bool(on_end[row, group].any()):
                continue
            delta = torch.zeros_like(scale)
            delta[row, group] = step
            slope = (surrogate(x, scale + delta) - surrogate(x, scale - delta)) / (2 * step)
            assert s.grad[row, group].item() == pytest.approx(slope.item(), abs=1e-6)
    clamped = (code < qmin) | (code > qmax)
    assert bool(clamped.any())
    assert bool((a.grad.view(3, 2, 4)[clamped] == 0).all())
    expected = (code.clamp(qmin, qmax) - shift.unsqueeze(-1)) - torch.where(clamped, 0.0, ratio)
    assert torch.allclose(s.grad, (expected * upstream.view(3, 2, 4)).sum(-1))


def test_scale_gradient_factor_and_shared_scale() -> None:
    x = normal(6, 10)
    scale = torch.tensor([0.2], requires_grad=True)
    fake_quantize(x, scale, None, 4).sum().backward()
    plain = scale.grad
    assert plain is not None
    scale = torch.tensor(0.2, requires_grad=True)
    factor = lsq_gradient_scale(60, 4)
    assert factor == pytest.approx((60 * 7) ** -0.5)
    fake_quantize(x, scale, None, 4, scale_gradient=factor).sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(plain.item() * factor, rel=1e-5)


def test_tokens_have_their_own_scales() -> None:
    x = normal(2, 3, 16) * torch.tensor([0.01, 1.0, 100.0])[:, None]
    codes, scale = quantize_tokens(x)
    assert scale.shape == (2, 3, 1)
    assert codes.dtype == torch.int8
    assert bool(((dequantize(codes, scale, None) - x).abs() <= scale * 0.51).all())
    empty, scale = quantize_tokens(torch.empty(0, 16))
    assert empty.shape == (0, 16)
    assert scale.shape == (0, 1)


def test_clip_of_a_gaussian_at_four_bits() -> None:
    # The optimum for 4 bits and unit variance lies at 2.5 to 2.6 standard deviations.
    x = normal(1, 1 << 17, seed=3)
    point = float(mse_clip(x, 4, steps=400, step=0.002)[0, 0] * x.abs().max())
    assert 2.49 < point < 2.61


def test_clip_against_every_point() -> None:
    x = normal(1, 1 << 12, seed=4)
    clip = mse_clip(x, 4, steps=1000, step=0.001)
    point = float(clip[0, 0] * x.abs().max())
    assert point == pytest.approx(best_clip(x[0], 4, candidates=2000), rel=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_clip_against_every_share(symmetric: bool, weighted: bool) -> None:
    x = normal(2, 5, 24) ** 3
    importance = normal(2, 1, 24, seed=1).square() if weighted else None
    clip = mse_clip(x, 3, 8, symmetric, importance=importance, scale_dtype=torch.bfloat16)
    assert clip.shape == (2, 5, 3)
    weights = torch.ones(()) if importance is None else importance
    losses = []
    for i in range(90):
        scale, zero = find_scale(x, 3, 8, symmetric, clip=1 - 0.01 * i, scale_dtype=torch.bfloat16)
        error = (fake_quantize(x, scale, zero, 3) - x).square() * weights
        losses.append(error.view(2, 5, 3, 8).sum(-1))
    least = torch.stack(losses).amin(0)
    found_scale, found_zero = find_scale(x, 3, 8, symmetric, clip=clip, scale_dtype=torch.bfloat16)
    found = ((fake_quantize(x, found_scale, found_zero, 3) - x).square() * weights).view(2, 5, 3, 8).sum(-1)
    assert torch.allclose(found, least, rtol=1e-5)


def test_clip_works_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, importance = normal(3, 7, 32), normal(3, 1, 32, seed=1).square()
    whole = mse_clip(x, 4, 8, importance=importance)
    monkeypatch.setattr("layerwright.nn.quantizer.CHUNK_NUMEL", 96)
    assert torch.equal(mse_clip(x, 4, 8, importance=importance), whole)
    assert torch.equal(mse_clip(x, 4, 8), mse_clip(x.view(21, 32), 4, 8).view(3, 7, 4))


def test_range_of_activations() -> None:
    scale, zero = range_scale(torch.tensor(-1.0), torch.tensor(3.0), 8)
    assert scale.item() == pytest.approx(3 / 127.5)
    assert zero is None


def test_bad_input() -> None:
    for bits in (1, 9, 4.0, True):
        with pytest.raises(InputError, match="bits"):
            find_scale(normal(2, 4), bits)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="group_size: 3 does not divide the 4 inputs"):
        find_scale(normal(2, 4), 4, 3)
    with pytest.raises(InputError, match="scale"):
        quantize(normal(2, 4), torch.ones(2, 3), None, 4)
