from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from layerwright.core.errors import InputError
from layerwright.nn._wavefront import CORNERS, Corner, matrix_inverse, sequential_inverse, wavefront_inverse
from layerwright.nn.invertible_conv import FInCConv, PaddedInvertibleConv2d, ResidualError
from oracles.finc import forward_substitution, jacobian_logdet, padded_convolution


def _conv(channels: int, k: int, corner: Corner, seed: int = 0, **more: Any) -> PaddedInvertibleConv2d:
    draw = torch.Generator().manual_seed(seed)
    conv = PaddedInvertibleConv2d(channels, k, corner, generator=draw, **more).double()
    with torch.no_grad():
        conv.weight.mul_(3)
    return conv


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.baddbmm_.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_convolution_is_the_definition_and_has_its_inverse(corner: Corner, k: int) -> None:
    conv, x = _conv(3, k, corner), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    y, logdet = conv(x)
    torch.testing.assert_close(y, padded_convolution(x, conv.effective_weight().detach(), corner))
    assert logdet.tolist() == [0, 0]
    for method in ("wavefront", "sequential", "matrix"):
        assert (conv.inverse(y, method, check=True) - x).abs().max() < 1e-12  # type: ignore[arg-type]
    single = conv.float()
    again = single.inverse(single(x.float())[0])
    assert (again - x).abs().max() < 1e-5


@settings(deadline=None, max_examples=25)
@given(
    k=st.integers(1, 4), height=st.integers(1, 7), width=st.integers(1, 7), channels=st.integers(1, 3),
    corner=st.sampled_from(CORNERS), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_size_has_its_inverse(k: int, height: int, width: int, channels: int, corner: Corner, seed: int) -> None:
    conv = _conv(channels, k, corner, seed, learn_diagonal=True)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        conv.log_diagonal.normal_(0, 0.3, generator=draw)  # type: ignore[union-attr]
    x = torch.randn(2, channels, height, width, dtype=torch.float64, generator=draw)
    y = conv(x)[0]
    torch.testing.assert_close(conv.inverse(y), x)
    torch.testing.assert_close(conv.inverse(y), conv.inverse(y, "matrix"))


def test_the_pixel_loop_agrees_with_substitution_channel_by_channel() -> None:
    conv, y = _conv(3, 3, "TL", learn_diagonal=True), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    weight = conv.effective_weight().detach()
    expected = forward_substitution(y, weight)
    for inverse in (wavefront_inverse, sequential_inverse, matrix_inverse):
        torch.testing.assert_close(inverse(y, weight, "TL"), expected)  # type: ignore[operator]


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("corner", CORNERS)
def test_the_determinant_is_that_of_the_jacobian(corner: Corner, learn: bool) -> None:
    conv = _conv(3, 3, corner, learn_diagonal=learn)
    if learn:
        with torch.no_grad():
            conv.log_diagonal.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    found = jacobian_logdet(lambda flat: conv(flat.view(1, 3, 6, 6))[0].flatten(), x.flatten())
    assert found == pytest.approx(float(conv(x)[1][0].detach()), abs=1e-10)
    assert (abs(found) > 0.1) == learn


def test_the_jacobian_is_triangular_in_raster_order() -> None:
    conv, size = _conv(2, 3, "TL"), (4, 3, 2)

    def raster(flat: torch.Tensor) -> torch.Tensor:
        return conv(flat.view(size).permute(2, 0, 1)[None])[0][0].permute(1, 2, 0).flatten()

    jacobian = torch.autograd.functional.jacobian(raster, torch.randn(24, dtype=torch.float64))  # type: ignore[no-untyped-call]
    assert (torch.triu(jacobian, 1) == 0).all() and (jacobian.diagonal() == 1).all()
    assert torch.tril(jacobian, -1).count_nonzero() > 100


@pytest.mark.parametrize(("corner", "axes"), [("TR", (-1,)), ("BL", (-2,)), ("BR", (-2, -1))])
def test_corners_are_flips_of_one_another(corner: Corner, axes: tuple[int, ...]) -> None:
    conv, plain = _conv(2, 3, corner), _conv(2, 3, "TL")
    with torch.no_grad():
        plain.weight.copy_(conv.weight.flip(axes))
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(conv(x)[0], plain(x.flip(axes))[0].flip(axes))
    torch.testing.assert_close(conv.inverse(x), plain.inverse(x.flip(axes)).flip(axes))


@pytest.mark.parametrize("corner", CORNERS)
def test_a_pixel_sees_the_window_towards_its_corner_and_only_one_tap_is_masked(corner: Corner) -> None:
    conv = _conv(2, 3, corner)
    x = torch.randn(1, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    conv(x)[0][0, :, 3, 3].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0).nonzero()
    rows, columns = ((1, 3) if corner[0] == "T" else (3, 5)), ((1, 3) if corner[1] == "L" else (3, 5))
    assert (seen.min(0).values.tolist(), seen.max(0).values.tolist()) == ([rows[0], columns[0]], [rows[1], columns[1]])
    assert len(seen) == 9
    conv(x)[0].square().sum().backward()
    assert conv.weight.grad is not None
    u, v = (2 if corner[0] == "T" else 0), (2 if corner[1] == "L" else 0)
    assert int((conv.weight.grad == 0).sum()) == 3, "C (C + 1) / 2 of 36 weights are fixed"
    assert conv.weight.grad[:, :, u, v].count_nonzero() == 1 and conv.weight.grad[1, 0, u, v] != 0


def test_four_corners_take_the_diagonals_together() -> None:
    conv, y = FInCConv(8, 3).double(), torch.randn(2, 8, 5, 9, dtype=torch.float64)
    steps: list[int] = []
    with _Products() as products, torch.no_grad():
        x = conv.inverse(y, on_step=steps.append)
    assert steps == list(range(5 + 9 - 1))
    assert products.count == 3 * (5 + 9 - 1), "a product for each diagonal and row of taps, whatever the corners"
    pixels: list[int] = []
    torch.testing.assert_close(conv.inverse(y, "sequential", on_step=pixels.append), x)
    assert len(pixels) == 4 * 5 * 9
    torch.testing.assert_close(torch.cat([b.inverse(p) for b, p in zip(conv.blocks, y.chunk(4, 1), strict=True)], 1), x)  # type: ignore[operator]
    torch.testing.assert_close(conv(x)[0], y)
    assert [block.corner for block in conv.blocks] == list(CORNERS) and conv(x)[1].tolist() == [0, 0]


def test_gradients_of_the_inverse_are_those_of_the_matrix_and_go_on() -> None:
    conv, y = _conv(2, 3, "BR", learn_diagonal=True), torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.stack([conv.effective_weight(), _conv(2, 3, "TL", 5).effective_weight()]).detach().requires_grad_()
    found = [
        torch.autograd.grad(inverse(y, weight, ("BR", "TL")).pow(3).sum(), (y, weight))
        for inverse in (wavefront_inverse, matrix_inverse)
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    small = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    kernel = _conv(2, 2, "TR").effective_weight().detach().requires_grad_()
    with torch.no_grad():
        kernel[0, 1, 1, 0] = 0.7  # above the diagonal: not read
    assert torch.autograd.gradcheck(lambda a, w: wavefront_inverse(a, w, "TR"), (small, kernel))
    assert torch.autograd.gradgradcheck(lambda a, w: wavefront_inverse(a, w, "TR"), (small, kernel))


def test_training_moves_the_inverse_through_the_layer() -> None:
    conv, y = FInCConv(4, 2), torch.randn(1, 4, 3, 3)
    conv.inverse(y).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in conv.parameters())


def test_compiles_whole_and_runs_in_bfloat16() -> None:
    conv, x = FInCConv(8), torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(torch.compile(conv, fullgraph=True, backend="eager")(x)[0], conv(x)[0])
    half = FInCConv(8).bfloat16()
    y, logdet = half(x.bfloat16())
    assert y.dtype == logdet.dtype == torch.bfloat16
    again = half.inverse(y)
    assert again.dtype == torch.bfloat16 and (again.float() - x).abs().max() < 0.1
    with torch.device("meta"):
        assert FInCConv(8).blocks[0].weight.is_meta  # type: ignore[union-attr]


def test_large_taps_are_noticed() -> None:
    conv, x = PaddedInvertibleConv2d(4, 3), torch.randn(1, 4, 24, 24)
    with torch.no_grad():
        conv.weight.mul_(60)
    with pytest.raises(ArithmeticError, match="off by"):
        conv.inverse(conv(x)[0] + 0.5, check=True)
    with pytest.raises(ResidualError):
        conv.inverse(x.double().float(), check=True, tolerance=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FInCConv(6), "channels"),
        (lambda: FInCConv(8, 0), "kernel_size"),
        (lambda: PaddedInvertibleConv2d(2, 3, "T"), "corner"),  # type: ignore[arg-type]
        (lambda: PaddedInvertibleConv2d(2)(torch.zeros(2, 4, 4)), "x: got shape"),
        (lambda: FInCConv(4)(torch.zeros(1, 8, 4, 4)), "x: got shape"),
        (lambda: FInCConv(4).inverse(torch.zeros(4, 4, 4)), "y: got shape"),
        (lambda: PaddedInvertibleConv2d(2).inverse(torch.zeros(1, 2, 4, 4), "fast"), "method"),  # type: ignore[arg-type]
        (lambda: wavefront_inverse(torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 3, 2)), "weight: got shape"),
        (lambda: wavefront_inverse(torch.zeros(1, 2, 4, 4), torch.full((2, 2, 3, 3), torch.nan)), "weight: holds"),
        (lambda: wavefront_inverse(torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 3, 3)), "weight: channel 0 has 0"),
        (lambda: wavefront_inverse(torch.zeros(1, 3, 4, 4), torch.zeros(2, 2, 3, 3)), "y: got shape"),
        (lambda: wavefront_inverse(torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 3, 3), "XY"), "corner"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
    with pytest.raises(TypeError, match="floating-point"):
        wavefront_inverse(torch.zeros(1, 2, 4, 4, dtype=torch.long), torch.zeros(2, 2, 3, 3))
