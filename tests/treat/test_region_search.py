"""OPT-m: all ratios and shares are tried, by plain, output and second-order errors; SQ-b keeps the function."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.nn.activation import round_two_regions
from layerwright.treat.activations import hessian_error, search_region_ratio
from layerwright.treat.activations.ranges import SHARES, output_error, squared_error
from layerwright.treat.migrate import find_norm_readers
from layerwright.treat.smooth import channel_ranges, smooth_
from zoo import ZOO, logits


def gelu_values(tokens: int = 64, channels: int = 12) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x = 1.5 * torch.randn(tokens, channels, generator=g)
    return F.gelu(torch.where(torch.rand(x.shape, generator=g) < 0.02, 5 * x, x))


@pytest.mark.parametrize("objective", ["mse", "output", "hessian", "diagonal"])
@pytest.mark.parametrize("bits", [3, 5])
def test_search_is_brute_force(bits: int, objective: str) -> None:
    x = gelu_values()
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(7, 12, generator=g)
    gradients = torch.randn(50, 7, generator=g)
    moment = gradients.T @ gradients / 50
    error = {
        "mse": squared_error,
        "output": output_error(weight),
        "hessian": hessian_error(weight, moment),
        "diagonal": hessian_error(weight, moment.diagonal()),
    }[objective]
    ratio, scale, losses = search_region_ratio(x, bits, signed=True, error=error)
    assert losses.shape == (bits + 3, 11)
    top = (1 << (bits - 1)) - 1
    best = None
    for m, share in itertools.product(range(bits + 3), SHARES):
        fine = x.max() * share / top / 2**m
        off = (x - round_two_regions(x, fine, bits, m, signed=True)).double()
        moved = off @ weight.T.double()
        slow = {
            "mse": off.square().mean(),
            "output": moved.square().mean(),
            "hessian": torch.stack([0.5 * row @ moment.double() @ row for row in moved]).mean(),
            "diagonal": torch.stack([0.5 * (row.square() * moment.diagonal()).sum() for row in moved]).mean(),
        }[objective]
        torch.testing.assert_close(losses[m, SHARES.index(share)].double(), slow, rtol=1e-4, atol=1e-9)
        if best is None or slow < best[0]:
            best = (slow, m, fine)
    assert best is not None and ratio == best[1]
    torch.testing.assert_close(scale, best[2].reshape(1))
    # The coarse step is the fine one shifted by whole bits, and reaches the share of the largest value.
    assert float(scale * 2**ratio * top / x.max()) in [pytest.approx(share, rel=1e-5) for share in SHARES]


def test_objectives_may_differ() -> None:
    x = gelu_values(256)
    weight = torch.zeros(2, 12)
    weight[0, 0] = weight[1, 1] = 1.0
    only = hessian_error(weight, torch.tensor([1.0, 0.0]))
    # Channels that the output's gradient does not see do not count.
    y = x.clone()
    y[:, 1:] = 0
    assert float(only(x, y)) == 0
    y[:, 0] = 0
    assert float(only(x, y)) == pytest.approx(float(x[:, 0].square().mean() / 2), rel=1e-5)


@pytest.mark.parametrize("name", ["vit", "deit", "swin"])
def test_shift_and_smoothing_keep_the_function(name: str) -> None:
    model, batches = ZOO[name]()
    model.double().eval()
    calibration = as_calibration(
        [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    )
    copy = structure_copy(model)
    smooth_(copy, calibration, alpha=0.5, shift="auto")
    with torch.no_grad():
        for batch in calibration:
            torch.testing.assert_close(logits(copy, batch), logits(model, batch), rtol=0, atol=1e-5)
    # Swin's patch merging reads its norm with a layer that has no bias: it has one now.
    if name == "swin":
        merging = [m for m in copy.modules() if type(m).__name__ == "SwinPatchMerging"]
        assert merging and all(isinstance(m.reduction.bias, nn.Parameter) for m in merging if m.norm.bias is not None)


def test_a_constant_channel_is_not_scaled() -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        model[0].weight[2] = 0  # the channel is its bias
        model[0].bias[2] = 3.0
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    calibration = as_calibration([x])
    copy = structure_copy(model)
    smooth_(copy, calibration, shift=True)
    torch.testing.assert_close(copy(x), model(x), rtol=0, atol=1e-5)
    (group,) = find_norm_readers(copy, calibration)
    low, high = channel_ranges(copy, calibration, (group,))[group.norm]
    assert float(low[2].abs()) < 1e-6 and float(high[2].abs()) < 1e-6
    torch.testing.assert_close(copy[1].weight[:, 2], model[1].weight[:, 2])
    assert copy[1].bias is not None and model[1].bias is None


def test_bad_input() -> None:
    for bits in (2, 9):
        with pytest.raises(InputError, match="expected 3 to 8"):
            search_region_ratio(torch.rand(4, 4), bits, signed=False)
    with pytest.raises(InputError, match="no ratio has a finite error"):
        search_region_ratio(torch.rand(4, 4), 4, signed=False, error=lambda x, y: (x - y).sum() * torch.nan)
    vit, batches = ZOO["vit"]()
    for alpha in (-0.1, 1.1):
        with pytest.raises(InputError, match="expected balance, log or none, and 0 to 1"):
            smooth_(structure_copy(vit), as_calibration(batches), alpha=alpha)
    from transformers import Swinv2Config, Swinv2ForImageClassification

    config = Swinv2Config(
        image_size=8, patch_size=2, num_channels=3, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    post_norm = Swinv2ForImageClassification(config).eval()
    images = [{"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}]
    groups = find_norm_readers(post_norm, as_calibration(images))
    assert all(group.others for group in groups)
    with pytest.raises(InputError, match=r"only goes into linear layers \(swinv2\.\S*norm\S* is also read by"):
        smooth_(post_norm, as_calibration(images))
