from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.hough_groups import HoughKind, SharedKernel, chm_groups, group_numbers
from layerwright.nn.hough_matching import CenterPivotConv4d, CHM4d, CHM6d

KINDS: tuple[HoughKind, ...] = ("psi", "iso", "full")


def _with_weights(layer: CHM4d | CHM6d, seed: int = 0) -> Any:
    """The layer in float64 with weights of any sign, and a bias."""
    draw = torch.Generator().manual_seed(seed)
    layer.double()
    with torch.no_grad():
        layer.kernel.weight.normal_(generator=draw).mul_(layer.kernel.sizes)
        if layer.bias is not None:
            layer.bias.fill_(0.3)
    return layer


def _brute(corr: Tensor, kernel: Tensor) -> Tensor:
    """A convolution over all axes of ``corr`` by its definition: each entry of the kernel moves the whole array."""
    reach = [side // 2 for side in kernel.shape]
    out = torch.zeros_like(corr)
    for place in itertools.product(*(range(side) for side in kernel.shape)):
        into, out_of = [], []
        for step, half, side in zip(place, reach, corr.shape, strict=True):
            offset = step - half
            into.append(slice(max(0, -offset), side - max(0, offset)))
            out_of.append(slice(max(0, offset), side - max(0, -offset)))
        if all(part.start < part.stop for part in into):
            out[tuple(into)] += kernel[place] * corr[tuple(out_of)]
    return out


def _loops_4d(corr: Tensor, kernel: Tensor) -> Tensor:
    """Eight loops over ``(h, w, h', w')``: four for the result, four for the kernel."""
    out, reach = torch.zeros_like(corr), kernel.shape[0] // 2
    for x in itertools.product(*(range(side) for side in corr.shape)):
        for d in itertools.product(range(kernel.shape[0]), repeat=4):
            y = [a + b - reach for a, b in zip(x, d, strict=True)]
            if all(0 <= a < side for a, side in zip(y, corr.shape, strict=True)):
                out[x] += kernel[d] * corr[tuple(y)]
    return out


@pytest.mark.parametrize(("k", "psi", "iso"), [(3, 11, 6), (5, 55, 15), (7, 179, 27)])
def test_numbers_of_groups(k: int, psi: int, iso: int) -> None:
    for kind, count in (("psi", psi), ("iso", iso), ("full", k**4)):
        groups = chm_groups(k, kind)  # type: ignore[arg-type]
        assert len(groups) == count
        assert torch.cat(groups).sort().values.tolist() == list(range(k**4)), "a partition"


def test_groups_of_center_pivot_and_of_scales() -> None:
    for kind in ("psi", "iso"):
        assert (len(chm_groups(5, kind, True)), len(chm_groups(3, kind, True))) == (6, 3)  # type: ignore[arg-type]
        assert (len(torch.cat(chm_groups(5, kind, True))), len(torch.cat(chm_groups(3, kind, True)))) == (49, 17)  # type: ignore[arg-type]
    assert len(chm_groups(5, "full", True)) == 49
    psi = {tuple(group.tolist()) for group in chm_groups(3, "psi", dims=1)}
    iso = {tuple(group.tolist()) for group in chm_groups(3, "iso", dims=1)}
    assert psi == {(4,), (0, 8), (2, 6), (1, 3, 5, 7)} and iso == {(0, 4, 8), (2, 6), (1, 3, 5, 7)}


def test_members_of_a_group_agree_in_the_distances_and_groups_differ() -> None:
    for kind in ("psi", "iso"):
        keys = []
        for group in chm_groups(5, kind):  # type: ignore[arg-type]
            p = torch.stack([group // 125, group // 25 % 5], 1) - 2
            q = torch.stack([group // 5 % 5, group % 5], 1) - 2
            ends = torch.stack([p.square().sum(1), q.square().sum(1)], 1)
            apart = (p - q).square().sum(1, keepdim=True)
            found = torch.cat([ends.amax(1, True), ends.amin(1, True), apart], 1) if kind == "psi" else apart
            assert len(found.unique(dim=0)) == 1
            keys.append(tuple(found[0].tolist()))
        assert len(set(keys)) == len(keys)


def test_parameters() -> None:
    def count(layer: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in layer.parameters())

    assert [count(CHM6d(kind=kind)) for kind in KINDS] == [221, 46, 5626]
    assert [count(CHM4d(kind=kind)) for kind in KINDS] == [56, 16, 626]
    assert count(CHM6d(center_pivot=True)) == 25 and count(CHM4d(center_pivot=True, bias=False)) == 6


def test_a_weight_is_shared_out_over_its_group() -> None:
    layer = _with_weights(CHM6d(3, 3))
    kernel = layer.dense_kernel().detach()
    assert kernel.shape == (3, 3, 3, 3, 3, 3)
    torch.testing.assert_close(kernel.sum(), layer.kernel.weight.detach().sum())
    values = kernel.flatten()[layer.kernel.group == 5]
    assert len(values) == layer.kernel.sizes[5] > 1 and (values == values[0]).all()
    assert values[0] == layer.kernel.weight[5] / len(values)


def test_first_values() -> None:
    layer = CHM4d(5, generator=torch.Generator().manual_seed(3))
    entries = layer.kernel.weight / layer.kernel.sizes
    assert (entries.diff() >= 0).all() and entries.min() >= 0 and 2e-4 < entries.mean() < 2e-3
    kernel = layer.dense_kernel()
    assert kernel.argmax() == 312 and kernel[0, 0, 0, 0] == kernel.min(), "the centre most, the corners least"
    wide = CHM6d(3, 5, generator=torch.Generator().manual_seed(3))
    entries = wide.kernel.weight / wide.kernel.sizes
    assert (entries.diff() < 0).any() and entries.min() >= 0 and 5e-4 < entries.mean() < 1.2e-3
    assert 0.015 < CHM4d(5, "full").kernel.weight.mean() < 0.025
    assert torch.equal(CHM4d(generator=torch.Generator().manual_seed(3)).kernel.weight, layer.kernel.weight)


@pytest.mark.parametrize("center_pivot", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_4d_is_its_definition(kind: HoughKind, center_pivot: bool) -> None:
    layer, corr = _with_weights(CHM4d(3, kind, center_pivot)), torch.randn(2, 1, 3, 4, 2, 5, dtype=torch.float64)
    found = layer(corr).detach()
    for sample in range(2):
        expected = _loops_4d(corr[sample, 0], layer.dense_kernel().detach()) + 0.3
        assert (found[sample, 0] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("center_pivot", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_6d_is_its_definition(kind: HoughKind, center_pivot: bool) -> None:
    layer, corr = (
        _with_weights(CHM6d(3, 3, kind, center_pivot)),
        torch.randn(1, 1, 3, 3, 4, 4, 4, 4, dtype=torch.float64),
    )
    expected = _brute(corr[0, 0], layer.dense_kernel().detach()) + 0.3
    assert (layer(corr)[0, 0] - expected).abs().max() < 1e-10
    if kind == "psi":
        wide = _with_weights(CHM6d(3, 5, kind, center_pivot))
        expected = _brute(corr[0, 0], wide.dense_kernel().detach()) + 0.3
        assert (wide(corr)[0, 0] - expected).abs().max() < 1e-10


def test_both_ways_of_a_dense_convolution_and_the_loops_agree() -> None:
    """A brute force that is itself checked; scales that are few go by bands, many by rows; rectangles in all axes."""
    layer = _with_weights(CHM6d(3, 3))
    for scales in ((1, 1), (2, 3), (3, 4)):
        corr = torch.randn(2, 1, *scales, 3, 4, 5, 2, dtype=torch.float64)
        expected = torch.stack([_brute(part[0], layer.dense_kernel().detach()) for part in corr]) + 0.3
        torch.testing.assert_close(layer(corr)[:, 0].detach(), expected, rtol=0, atol=1e-10)
    kernel = torch.randn(3, 3, 3, 3, dtype=torch.float64)
    corr = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(_brute(corr, kernel), _loops_4d(corr, kernel))


@pytest.mark.parametrize("center_pivot", [False, True])
def test_a_kernel_may_be_larger_than_the_maps(center_pivot: bool) -> None:
    layer, corr = _with_weights(CHM4d(7, center_pivot=center_pivot)), torch.randn(1, 1, 1, 2, 2, 1, dtype=torch.float64)
    expected = _brute(corr[0, 0], layer.dense_kernel().detach()) + 0.3
    assert (layer(corr)[0, 0] - expected).abs().max() < 1e-10
    wide, corr = _with_weights(CHM6d(3, 5, center_pivot=center_pivot)), corr.expand(1, 1, 9, 1, 2, 2, 1)[:, :, :, None]
    expected = _brute(corr[0, 0], wide.dense_kernel().detach()) + 0.3
    assert (wide(corr)[0, 0] - expected).abs().max() < 1e-10


def test_4d_is_a_product_of_unfolded_windows() -> None:
    layer, corr = _with_weights(CHM4d(3)), torch.randn(1, 1, 4, 4, 4, 4, dtype=torch.float64)
    padded = functional.pad(corr, (1,) * 8)
    for axis in range(2, 6):
        padded = padded.unfold(axis, 3, 1)
    expected = padded.flatten(6) @ layer.dense_kernel().detach().flatten() + 0.3
    assert (layer(corr) - expected).abs().max() < 1e-10


def test_center_pivot_is_the_dense_layer_without_the_other_entries() -> None:
    pivot, dense = _with_weights(CHM4d(5, center_pivot=True)), _with_weights(CHM4d(5, "full"))
    with torch.no_grad():
        dense.kernel.weight.copy_(pivot.dense_kernel().flatten())
    kept = pivot.dense_kernel().view(25, 25) != 0
    expected = torch.zeros(25, 25, dtype=torch.bool)
    expected[12], expected[:, 12] = True, True
    assert torch.equal(kept, expected) and int(kept.sum()) == 49
    corr = torch.randn(2, 1, 6, 7, 5, 6, dtype=torch.float64)
    assert (pivot(corr) - dense(corr)).abs().max() < 1e-12


@pytest.mark.parametrize("center_pivot", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_turning_and_swapping_both_pictures(kind: HoughKind, center_pivot: bool) -> None:
    layer, corr = (
        _with_weights(CHM6d(3, 3, kind, center_pivot)),
        torch.randn(1, 1, 3, 3, 4, 4, 4, 4, dtype=torch.float64),
    )
    out = layer(corr).detach()

    def turned(values: Tensor) -> Tensor:
        return values.rot90(1, (4, 5)).rot90(1, (6, 7))

    def swapped(values: Tensor) -> Tensor:
        return values.permute(0, 1, 3, 2, 6, 7, 4, 5)

    gaps = [float((layer(move(corr)).detach() - move(out)).abs().max()) for move in (turned, swapped)]
    assert (max(gaps) < 1e-10) == (kind != "full") and (min(gaps) < 1e-10) == (kind != "full")
    small, flat = _with_weights(CHM4d(3, kind, center_pivot)), corr[:, :, 0, 0]
    gap = small(flat.permute(0, 1, 4, 5, 2, 3)) - small(flat).permute(0, 1, 4, 5, 2, 3)
    assert (float(gap.detach().abs().max()) < 1e-10) == (kind != "full")


@settings(deadline=None, max_examples=20)
@given(step=st.sampled_from([(1, 0), (0, 1), (-1, 1)]), pivot=st.booleans(), seed=st.integers(0, 99))
def test_moving_the_target_moves_the_votes_away_from_the_rims(step: tuple[int, int], pivot: bool, seed: int) -> None:
    layer = _with_weights(CHM4d(3, center_pivot=pivot), seed)
    corr = torch.randn(1, 1, 3, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    moved = layer(corr.roll(step, (4, 5))) - layer(corr).roll(step, (4, 5))
    assert moved[..., 2:-2, 2:-2].abs().max() < 1e-10
    assert moved.abs().max() > 1e-3


def test_several_channels_move_in_one_picture_at_a_time() -> None:
    torch.manual_seed(0)
    layer, corr = CenterPivotConv4d(2, 3, 3).double(), torch.randn(1, 2, 4, 3, 5, 4, dtype=torch.float64)
    kernel = torch.zeros(3, 2, 3, 3, 3, 3, dtype=torch.float64)
    kernel[:, :, :, :, 1, 1] += layer.conv1.weight.detach()
    kernel[:, :, 1, 1] += layer.conv2.weight.detach()
    bias = (layer.conv1.bias + layer.conv2.bias).detach()  # type: ignore[operator]
    for channel in range(3):
        expected = sum(_brute(corr[0, i], kernel[channel, i]) for i in range(2)) + bias[channel]
        torch.testing.assert_close(layer(corr)[0, channel].detach(), expected)


@pytest.mark.parametrize("stride", [2, (1, 2), (3, 1)])
def test_a_stride_takes_every_nth_place(stride: Any) -> None:
    torch.manual_seed(0)
    strided, plain = CenterPivotConv4d(2, 3, 3, stride), CenterPivotConv4d(2, 3, 3)
    plain.load_state_dict(strided.state_dict())
    first, second = (stride, stride) if isinstance(stride, int) else stride
    corr = torch.randn(2, 2, 5, 6, 7, 4)
    torch.testing.assert_close(strided(corr), plain(corr)[..., ::first, ::first, ::second, ::second])


def test_gradients_reach_weights_and_correlation() -> None:
    corr = torch.randn(1, 1, 3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    for pivot in (False, True):
        layer = _with_weights(CHM4d(3, center_pivot=pivot))
        assert torch.autograd.gradcheck(layer, (corr,))
        layer(corr).square().sum().backward()
        assert (layer.kernel.weight.grad != 0).all() and layer.bias.grad != 0
    wide = _with_weights(CHM6d(3, 3))
    wide(torch.randn(1, 1, 3, 3, 3, 3, 3, 3, dtype=torch.float64)).square().sum().backward()
    assert (wide.kernel.weight.grad != 0).all()


@pytest.mark.parametrize("pivot", [False, True])
def test_compiles_whole_and_runs_in_bfloat16_and_on_meta(pivot: bool) -> None:
    flat, wide = torch.rand(1, 1, 4, 4, 4, 4), torch.rand(1, 1, 3, 3, 4, 4, 4, 4)
    for layer, corr in ((CHM4d(3, center_pivot=pivot), flat), (CHM6d(3, 3, center_pivot=pivot), wide)):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(corr), layer(corr))
        expected = layer(corr)
        half = layer.bfloat16()(corr.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.01)
    conv = CenterPivotConv4d(1, 2)
    torch.testing.assert_close(torch.compile(conv, backend="eager", fullgraph=True)(flat), conv(flat))
    with torch.device("meta"):
        assert CHM6d(center_pivot=pivot).kernel.weight.is_meta and CHM4d(3, "full").kernel.weight.is_meta


def test_printed_forms() -> None:
    assert "kind='iso'" in repr(CHM4d(3, "iso")) and "scale_kernel=3" in repr(CHM6d())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chm_groups(4), "kernel_size"),
        (lambda: group_numbers(0), "kernel_size"),
        (lambda: CHM4d(2), "kernel_size: got 2"),
        (lambda: CHM6d(2), "kernel_size: got 2"),
        (lambda: CHM4d(3, "round"), "unknown kind"),  # type: ignore[arg-type]
        (lambda: CHM4d(3)(torch.zeros(1, 2, 3, 3, 3, 3)), "corr: got shape"),
        (lambda: CHM4d(3)(torch.zeros(1, 3, 3, 3, 3)), "corr: got shape"),
        (lambda: CHM4d(3)(torch.zeros(0, 1, 3, 3, 3, 3)), "corr: got shape"),
        (lambda: CHM6d(3, 3)(torch.zeros(1, 1, 3, 3, 3, 3)), "corr: got shape"),
        (lambda: CenterPivotConv4d(1, 1, 4), "kernel_size"),
        (lambda: CenterPivotConv4d(1, 1, 3, 0), "stride"),
        (lambda: CenterPivotConv4d(2, 1)(torch.zeros(1, 1, 3, 3, 3, 3)), "corr: got shape"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
    with pytest.raises(TypeError, match="floating-point"):
        CHM4d(3)(torch.zeros(1, 1, 3, 3, 3, 3, dtype=torch.long))


def test_an_entry_outside_all_groups_is_zero() -> None:
    kernel = SharedKernel([0, -1, 0, 1], (2, 2))
    with torch.no_grad():
        kernel.weight.copy_(torch.tensor([4.0, 3.0]))
    assert kernel().tolist() == [[2, 0], [2, 3]]
