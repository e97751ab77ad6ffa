from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.treat.fold import fold_batchnorm
from layerwright.tune._fake_layers import fake_layers, quantize_layers
from layerwright.tune.renormalize import fold_norms_, insert_norms, renormalize_, statistics_of


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Conv1d(4, 4, 3, stride=12),
        nn.Flatten(),
        nn.Linear(48, 5),
    ).eval()


LAYERS = ("0", "2", "3", "6", "8")


def images(count: int = 32, seed: int = 1) -> list[torch.Tensor]:
    return list(torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed)).split(16))


def quantized() -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    model, data = net(), images()
    return model, quantize_layers(model, data, dict.fromkeys(LAYERS, (3, 4))), data


@torch.no_grad()
def test_a_fresh_norm_is_the_identity():
    _, fake, data = quantized()
    x = torch.cat(data)
    before = fake(x)
    live = insert_norms(fake, statistics_of(fake, Calibration(data)))
    assert set(live) == set(LAYERS)
    torch.testing.assert_close(fake(x), before, atol=1e-5, rtol=1e-5)
    for item in live.values():
        item.remove()
    assert torch.equal(fake(x), before)


@torch.no_grad()
def test_folding_keeps_the_codes_and_equals_the_live_norms():
    _, fake, data = quantized()
    codes = {path: layer.codes() for path, layer in fake_layers(fake).items()}
    live = insert_norms(fake, statistics_of(fake, Calibration(data)))
    for item in live.values():
        item.norm.train()
    for x in data:
        fake(x)
    for item in live.values():
        item.norm.eval()
    x = torch.cat(images(seed=5))
    want = fake(x)
    fold_norms_(live)
    torch.testing.assert_close(fake(x), want, atol=1e-5, rtol=1e-5)
    for path, layer in fake_layers(fake).items():
        now = layer.codes()
        assert torch.equal(now[0], codes[path][0]) and torch.equal(now[2], codes[path][2])
        assert (now[1] > 0).all() and not torch.allclose(now[1], codes[path][1])


@torch.no_grad()
def test_outputs_get_the_full_precision_mean_and_deviation():
    """One batch, one layer: its output must then have exactly the statistics that were asked for."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 6, 3)), torch.cat(images())
    fake = quantize_layers(model, [x], {"0": (2, 3)})
    want, before = model(x), fake(x)
    renormalize_(fake, [x])
    after = fake(x)
    dims = (0, 2, 3)
    torch.testing.assert_close(after.mean(dims), want.mean(dims), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.std(dims), want.std(dims), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(before.mean(dims), want.mean(dims), atol=1e-3)


@torch.no_grad()
def test_folded_batchnorm_tells_the_statistics_even_with_negative_gains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)).eval()
    model[1].weight.copy_(torch.randn(6))
    model[1].bias.copy_(torch.randn(6))
    data = images()
    model[1].running_mean.copy_(model[0](torch.cat(data)).mean((0, 2, 3)))
    model[1].running_var.copy_(model[0](torch.cat(data)).var((0, 2, 3)))
    folded = fold_batchnorm(model)
    fake = quantize_layers(folded, data, {"0": (3, 4)})
    signs = fake[0].codes()[1].sign()
    mean, std = statistics_of(fake, Calibration(data))["0"]
    torch.testing.assert_close(mean, model[1].bias)
    torch.testing.assert_close(std, model[1].weight.abs())
    x = torch.cat(data)
    before = (fake(x) - model(x)).square().mean()
    renormalize_(fake, data)
    assert torch.equal(fake[0].codes()[1].sign(), signs)
    assert (fake(x) - model(x)).square().mean() < 1.5 * before
    torch.testing.assert_close(fake(x).mean((0, 2, 3)), model(x).mean((0, 2, 3)), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_reference_and_several_passes():
    model, fake, data = quantized()
    other = copy.deepcopy(fake)
    first = renormalize_(fake, data)
    second = renormalize_(other, data, reference=model, passes=3)
    for path in LAYERS:
        torch.testing.assert_close(first[path][0], second[path][0], atol=1e-4, rtol=1e-4)
    x = torch.cat(data)
    torch.testing.assert_close(fake(x), other(x), atol=1e-3, rtol=1e-3)


def test_mode_is_put_back_and_nothing_stays_behind():
    _, fake, data = quantized()
    fake.train()
    names = list(fake.state_dict())
    renormalize_(fake, data)
    assert fake.training and list(fake.state_dict()) == names
    assert not any(layer._forward_hooks for layer in fake_layers(fake).values())


def test_bad_input():
    model, fake, data = quantized()
    with pytest.raises(ValueError, match="no quantized layers"):
        renormalize_(model, data)
    with pytest.raises(ValueError, match="passes"):
        renormalize_(fake, data, passes=0)
    with pytest.raises(ValueError, match="reference"):
        renormalize_(fake, data, reference=nn.Sequential(nn.Linear(2, 2)))
    x = torch.cat(data)
    before = fake(x)
    with pytest.raises(ValueError, match="one value per channel"):
        renormalize_(fake, [x[:1]])
    assert torch.equal(fake(x), before)
