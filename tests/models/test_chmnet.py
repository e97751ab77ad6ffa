from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models.chmnet import CHMNet
from layerwright.models.keypoint_transfer import (
    normalize_points,
    pck,
    pixel_points,
    transfer_keypoints,
    transfer_loss,
)
from layerwright.nn.correlation import correlation_4d, interpolate_4d, mutual_nn_filter
from layerwright.nn.gradient_histograms import GradientHistograms


def _net(**settings: Any) -> CHMNet:
    return CHMNet(nn.Identity(), feat_dim=8, generator=torch.Generator().manual_seed(0), **settings)


def _diagonal(side: int, strength: float = 40.0) -> Tensor:
    """Scores of two equal pictures: each cell matches itself."""
    return strength * torch.eye(side * side).view(1, side, side, side, side)


@torch.no_grad()
def test_scores_are_the_chain_of_its_layers() -> None:
    net, first, second = _net(), torch.randn(2, 8, 6, 5), torch.randn(2, 8, 4, 6)
    scores = net(first, second)
    assert scores.shape == (2, 12, 10, 8, 12) and scores.min() > 0
    with torch.no_grad():
        net.chm6d.kernel.weight.mul_(50)
    pairs: list[Tensor] = []
    net.chm6d.register_forward_hook(lambda _m, given, out: pairs.extend([given[0], out]))
    scores = net(first, second)
    corr, votes = pairs
    assert corr.shape == votes.shape == (2, 1, 3, 3, 6, 5, 4, 6) and corr.min() >= 0
    best = votes.sigmoid().flatten(1, 3).amax(1)
    fine = net.chm4d(interpolate_4d(best, (12, 10), (8, 12))[:, None])[:, 0]
    torch.testing.assert_close(scores, mutual_nn_filter(torch.log1p(fine.exp())))


def test_weights_besides_backbone_and_convolutions() -> None:
    net = CHMNet(nn.Conv2d(3, 1024, 16, 16))
    new = net.learner_parameters()
    assert sum(p.numel() for p in new) - 3 * 1024 * 256 * 9 == 277
    assert len(new) + 2 == len(list(net.parameters()))
    assert [tuple(conv.weight.shape) for conv in net.convs] == [(256, 1024, 3, 3)] * 3  # type: ignore[union-attr]
    flat = _net(scales=(1.0,))
    assert flat.chm6d.scale_kernel == 1 and sum(p.numel() for p in flat.chm6d.parameters()) == 56
    assert sum(p.numel() for p in _net(center_pivot=True).learner_parameters()) == 3 * 2 * 8 * 9 + 24 + 6 + 2


def test_the_generator_decides_and_other_random_numbers_do_not() -> None:
    torch.manual_seed(1)
    one = _net()
    torch.manual_seed(2)
    other = _net()
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_swapping_the_pictures_swaps_the_scores() -> None:
    net, first, second = _net().double(), *torch.randn(2, 1, 8, 5, 5, dtype=torch.float64).split(1)
    with torch.no_grad():
        net.chm6d.kernel.weight.mul_(50)
        forth, back = net(first[0], second[0]), net(second[0], first[0])
    torch.testing.assert_close(back, forth.permute(0, 3, 4, 1, 2))
    assert (forth - back).abs().max() > 1e-6


def test_training_reaches_all_weights() -> None:
    net = CHMNet(GradientHistograms(), feat_dim=16, kernel_size=3, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 48, 48, generator=draw)
    points = torch.rand(2, 5, 2, generator=draw) * 1.6 - 0.8
    losses = []
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(12):
        predicted = transfer_keypoints(net(pictures, pictures.flip(3)), points, radius=0.3)
        loss = transfer_loss(predicted, points * torch.tensor([-1, 1]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_compiles_whole_and_runs_in_bfloat16() -> None:
    net, maps = _net(kernel_size=3), torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(maps, maps), net(maps, maps))
    half = net.bfloat16()(maps.bfloat16(), maps.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    assert transfer_keypoints(half, torch.zeros(1, 1, 2), radius=0.3).dtype == torch.float32


def test_equal_pictures_send_points_to_themselves() -> None:
    points = torch.rand(1, 40, 2, generator=torch.Generator().manual_seed(0)) * 1.9 - 0.95
    found = transfer_keypoints(_diagonal(30), points)
    assert (found - points).abs().max() < 1 / 29, "half a cell"
    maps = torch.randn(1, 32, 10, 10, generator=torch.Generator().manual_seed(1))
    corr = mutual_nn_filter(interpolate_4d(correlation_4d(maps, maps).clamp_min(0) * 60, (20, 20), (20, 20)))
    found = transfer_keypoints(corr, points, radius=0.12)
    assert (found - points).abs().max() < 1 / 19


def test_a_rectangle_keeps_x_and_y_apart() -> None:
    corr = torch.zeros(1, 3, 5, 4, 6)
    corr[0, 0, 4, 3, 1] = 60  # top right cell to bottom row, second column
    found = transfer_keypoints(corr, torch.tensor([[[1.0, -1.0]]]))
    torch.testing.assert_close(found, torch.tensor([[[-1 + 2 / 5, 1.0]]]))


def _slow_transfer(corr: Tensor, point: Tensor, sigma: float, radius: float) -> Tensor:
    """The definition, cell by cell, for one picture and one point."""
    h, w, height, width = corr.shape
    total, result = 0.0, torch.zeros(2, dtype=corr.dtype)
    for y in range(h):
        for x in range(w):
            scores = corr[y, x]
            best = int(scores.argmax())
            by, bx = best // width, best % width
            weighed = torch.stack([
                torch.stack([
                    scores[v, u] * torch.exp(torch.tensor(-((v - by) ** 2 + (u - bx) ** 2) / (2 * sigma**2)))
                    for u in range(width)
                ])
                for v in range(height)
            ])  # fmt: skip
            share = weighed.flatten().softmax(0).view(height, width)
            place = torch.zeros(2, dtype=corr.dtype)
            for v in range(height):
                for u in range(width):
                    place += share[v, u] * torch.tensor([-1 + 2 * u / (width - 1), -1 + 2 * v / (height - 1)])
            cell = torch.tensor([-1 + 2 * x / (w - 1), -1 + 2 * y / (h - 1)])
            near = max(0.0, radius - float(((cell - point).square().sum() + 1e-5).sqrt()))
            total, result = total + near, result + near * place
    return result / total


def test_transfer_is_its_definition_and_differentiable() -> None:
    corr = 5 * torch.rand(1, 3, 4, 4, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    points = torch.tensor([[[0.2, -0.3], [0.9, 0.9]]], dtype=torch.float64)
    found = transfer_keypoints(corr, points, sigma=1.5, radius=1.1)
    for number in range(2):
        torch.testing.assert_close(
            found[0, number], _slow_transfer(corr[0], points[0, number], 1.5, 1.1), atol=1e-6, rtol=0
        )
    assert torch.autograd.gradcheck(
        lambda c: transfer_keypoints(c, points, sigma=1.5, radius=1.1), (corr.requires_grad_(),), eps=1e-7, atol=1e-5
    )


def test_points_that_are_not_valid_come_back_as_padding() -> None:
    points = torch.tensor([[[0.0, 0.0], [-2.0, -2.0]]])
    valid = torch.tensor([[True, False]])
    found = transfer_keypoints(_diagonal(30), points, valid)
    assert found[0, 1].tolist() == [-2, -2] and found[0, 0].abs().max() < 0.05
    assert transfer_loss(found, torch.zeros(1, 2, 2), valid) < 1e-2


def test_a_point_between_the_cells() -> None:
    point = torch.tensor([[[0.3, 0.35]]])
    with pytest.raises(InputError, match="radius"):
        transfer_keypoints(_diagonal(5), point)
    found = transfer_keypoints(_diagonal(5), point, fallback=True)
    torch.testing.assert_close(found, torch.tensor([[[0.5, 0.5]]]))


def test_the_loss_is_a_mean_of_means() -> None:
    predicted, true = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    true[1] = 2
    valid = torch.tensor([[True, True, True], [True, False, False]])
    assert float(transfer_loss(predicted, true, valid)) == pytest.approx((2 + 8) / 2)
    assert float(transfer_loss(predicted, true)) == pytest.approx(5)
    valid[1] = False
    assert float(transfer_loss(predicted, true, valid)) == pytest.approx(2), "a pair without points does not count"


def test_pck_by_hand() -> None:
    true = torch.zeros(2, 3, 2)
    predicted = torch.tensor([[[3.0, 4.0], [0.0, 10.0], [30.0, 0.0]], [[6.0, 0.0], [0.0, 20.0], [0.0, 0.0]]])
    shares = pck(predicted, true, torch.tensor([100.0, 50.0]), (0.05, 0.1, 0.15))
    torch.testing.assert_close(shares, torch.tensor([[1, 2, 2], [1, 1, 2]]) / 3)
    valid = torch.tensor([[True, True, False], [False, False, True]])
    assert pck(predicted, true, 100.0, (0.1,), valid).tolist() == [[1], [1]]


def test_pixels_and_back() -> None:
    points = torch.tensor([[[0.0, 0.0], [64.0, 24.0], [32.0, 48.0]]])
    unit = normalize_points(points, 48, 64)
    assert unit.tolist() == [[[-1, -1], [1, 0], [0, 1]]]
    assert torch.equal(pixel_points(unit, 48, 64), points)


CORR, POINT = torch.rand(1, 12, 12, 12, 12), torch.zeros(1, 1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _net(kind="odd"), "unknown kind"),
        (lambda: _net(kernel_size=4), "kernel_size"),
        (lambda: _net(projection_kernel=2), "projection_kernel"),
        (lambda: _net(scales=()), "scales"),
        (lambda: CHMNet(nn.Identity(), feat_dim=3), "projected_dim"),
        (lambda: _net()(torch.zeros(1, 8, 4, 4), torch.zeros(1, 7, 4, 4)), "target: got maps"),
        (lambda: _net()(torch.zeros(2, 8, 4, 4), torch.zeros(1, 8, 4, 4)), "batch"),
        (lambda: transfer_keypoints(CORR[0], POINT), "corr: got shape"),
        (lambda: transfer_keypoints(CORR, POINT[0]), "points: got shape"),
        (lambda: transfer_keypoints(CORR, POINT, sigma=0), "sigma"),
        (lambda: transfer_keypoints(CORR, POINT, radius=-1), "radius"),
        (lambda: transfer_keypoints(CORR, POINT + 1.5), "points: some"),
        (lambda: transfer_keypoints(CORR, POINT * torch.nan), "points: some"),
        (lambda: transfer_keypoints(CORR, POINT, torch.tensor([[False]])), "valid: got no"),
        (lambda: transfer_keypoints(CORR, POINT, torch.tensor([[1.0]])), "valid: got torch.float32"),
        (lambda: pck(POINT, POINT[:, :0], 1.0, (0.1,)), "predicted, true"),
        (lambda: pck(POINT[:0], POINT[:0], 1.0, (0.1,)), "predicted, true"),
        (lambda: pck(POINT, POINT, 0.0, (0.1,)), "threshold_size"),
        (lambda: pck(POINT, POINT, 1.0, (0.0,)), "alphas"),
        (lambda: pck(POINT, POINT, 1.0, ()), "alphas"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
