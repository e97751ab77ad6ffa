"""Clipped channel ranges moved into norms: exact in floating point, one grid instead of many in integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.treat.migrate import find_norm_readers, sample_norms
from layerwright.treat.prepare import prepare_
from layerwright.treat.reparameterize import (
    channel_params,
    clip_channel_params,
    reparameterize_,
    reparameterize_norm_,
    shared_grid,
)
from zoo import ZOO, logits


def channels(seed: int = 0, tokens: int = 400, width: int = 24) -> Tensor:
    """Channels of different offsets, three of them fifteen times as wide."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) + torch.randn(width, generator=generator)
    x[:, :3] *= 15
    return x


def rounded(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """``s (round(x / s + z) - z)`` with an unrounded zero point."""
    codes = (x / scale + zero).round().clamp(0, 2**bits - 1)
    return (codes - zero) * scale


@given(st.integers(0, 1000), st.sampled_from([3, 4, 6]), st.sampled_from(["none", "std", "iqr"]))
@settings(max_examples=20, deadline=None)
def test_a_grid_per_channel_is_one_grid_afterwards(seed: int, bits: int, rule: Any) -> None:
    x = channels(seed).double()
    scale, zero = clip_channel_params(*channel_params(x, bits), bits, rule)
    scale, zero = scale.double(), zero.double()
    divisor, offset, step, common = shared_grid(scale, zero)
    moved = (x - offset) / divisor
    one = rounded(moved, torch.tensor(step).double(), torch.tensor(common).double(), bits)
    # On a grid the rounded code is the same but where a value lies within float error of the middle of two.
    per_channel = rounded(x, scale, zero, bits)
    difference = (one * divisor + offset - per_channel).abs()
    assert (difference > 1e-6 * per_channel.abs().max()).double().mean() < 1e-3
    lowest = ((-zero * scale) - offset) / divisor
    torch.testing.assert_close(lowest, torch.full_like(lowest, -common * step), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vit", "deit", "swin", "opt"])
@pytest.mark.parametrize("rule", ["none", "std", "iqr", "percentile"])
def test_the_model_computes_the_same(name: str, rule: str) -> None:
    model, batches = ZOO[name]()
    calibration = as_calibration(batches)
    copy = structure_copy(model)
    notes = reparameterize_(copy, calibration, rule=rule, k=2.0)  # type: ignore[arg-type]
    assert len(notes) >= 4 and "one grid of step" in notes[0]
    for batch in batches:
        torch.testing.assert_close(logits(copy, batch), logits(model, batch), rtol=0, atol=1e-5)


def test_channels_share_their_range_afterwards() -> None:
    model, batches = ZOO["vit"]()
    calibration = as_calibration(batches)
    groups = find_norm_readers(model, calibration)
    before = sample_norms(model, calibration, groups)
    copy = structure_copy(model)
    reparameterize_(copy, calibration, rule="none", shift=True)
    after = sample_norms(copy, calibration, groups)
    for group in groups:
        spans = [s[group.norm].high - s[group.norm].low for s in (before, after)]  # type: ignore[operator]
        assert spans[1].std() < 0.25 * spans[0].std()
        low = after[group.norm].low
        assert low is not None and (low - low.mean()).abs().max() < 0.2 * spans[1].mean()


def test_clipping_touches_outliers_only_and_infinity_touches_none() -> None:
    x = channels()
    scale, zero = channel_params(x, 4)
    for rule, k in (("iqr", 1.5), ("std", 2.0)):
        new_scale, new_zero = clip_channel_params(scale, zero, 4, rule, k)  # type: ignore[arg-type]
        changed = (new_scale != scale) | (new_zero != zero)
        assert changed[:3].all() and not changed[3:].any()
        assert (new_scale[:3] < scale[:3]).all()
    for given_rule in ({"rule": "none"}, {"rule": "iqr", "k": float("inf")}, {"rule": "std", "k": float("inf")}):
        same = clip_channel_params(scale, zero, 4, **given_rule)  # type: ignore[arg-type]
        assert torch.equal(same[0], scale) and torch.equal(same[1], zero)
    low, high = -zero * scale, -zero * scale + 15 * scale
    clipped = clip_channel_params(scale, zero, 4, "iqr", 1.5)
    bottom = -clipped[1] * clipped[0]
    first, third = low.double().quantile(0.25), low.double().quantile(0.75)
    assert float(bottom.min()) == pytest.approx(float(max(low.min().double(), first - 1.5 * (third - first))), rel=1e-4)
    assert float((bottom + 15 * clipped[0]).max()) < float(high.max())


def test_without_clipping_every_step_is_that_of_repq() -> None:
    x = channels(3)
    scale, zero = channel_params(x, 4)
    divisor, offset, step, common = shared_grid(scale, zero)
    torch.testing.assert_close(step, float(scale.double().mean()))
    torch.testing.assert_close(common, float(zero.double().mean()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(divisor, (scale / scale.mean()).double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(offset, (-zero * scale + common * scale).double(), rtol=1e-4, atol=1e-5)


def test_a_range_per_channel_beats_one_for_all() -> None:
    x = channels(1)
    scale, zero = channel_params(x, 4)
    whole = channel_params(x.reshape(-1, 1), 4)
    fine = (x - rounded(x, scale, zero, 4)).square().mean(0)
    coarse = (x - rounded(x, whole[0], whole[1], 4)).square().mean(0)
    assert (fine < coarse).all()
    assert fine[3:].sum() < 0.05 * coarse[3:].sum()


def test_constant_channels_are_moved_only() -> None:
    x = channels(2)
    x[:, 5], x[:, 6] = 2.5, 0.0
    scale, zero = channel_params(x, 4)
    assert scale[5] == 0 and scale[6] == 0
    for rule in ("none", "std", "iqr"):
        found = clip_channel_params(scale, zero, 4, rule)  # type: ignore[arg-type]
        divisor, offset, step, common = shared_grid(*found)
        assert divisor[5] == 1 and divisor[6] == 1
        moved = (x.double() - offset) / divisor
        codes = (moved / step + common).round()
        assert (codes[:, 5:7] == 0).all()
        back = (codes - common) * step * divisor + offset
        torch.testing.assert_close(back[:, 5:7], x[:, 5:7].double(), rtol=0, atol=1e-5)
    divisor, offset, step, common = shared_grid(torch.zeros(2), torch.tensor([-1.0, 3.0]))
    assert divisor.tolist() == [1, 1] and offset.tolist() == [1 + common, -3 + common] and step == 1.0


class Net(nn.Module):
    """A norm without weight or bias that two readers share, one of them without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6, elementwise_affine=False)
        self.first = nn.Linear(6, 3, bias=False)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.first(y), self.second(y)], -1)


def test_several_readers_and_missing_weights() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Net(), torch.randn(40, 6)
    calibration = as_calibration([{"x": x}])
    copy = structure_copy(model)
    (note,) = reparameterize_(copy, calibration, shift=True)
    assert "first, second" in note
    torch.testing.assert_close(copy(x), model(x), rtol=0, atol=1e-5)
    assert copy.first.bias is not None and model.first.bias is None
    assert copy.norm.weight is not None and model.norm.weight is None


def test_norms_without_bias_take_factors_only() -> None:
    model, batches = ZOO["llama"]()
    calibration = as_calibration(batches)
    with pytest.raises(InputError, match="shift: false"):
        reparameterize_(structure_copy(model), calibration, shift=True)
    group = find_norm_readers(model, calibration)[0]
    with pytest.raises(ValueError, match="no bias to shift"):
        reparameterize_norm_(structure_copy(model), group, torch.ones(group.channels), torch.zeros(group.channels))
    for shift in (False, "auto"):
        copy = structure_copy(model)
        reparameterize_(copy, calibration, shift=shift)  # type: ignore[arg-type]
        torch.testing.assert_close(logits(copy, batches[0]), logits(model, batches[0]), rtol=1e-4, atol=1e-5)
        assert getattr(copy.model.layers[0].input_layernorm, "bias", None) is None


def test_bfloat16_models_keep_their_dtype() -> None:
    model, batches = ZOO["vit"]()
    model.to(torch.bfloat16)
    batches = [{k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    copy = structure_copy(model)
    # Weights are rounded once, so that the output moves by what bfloat16 resolves.
    groups = find_norm_readers(copy, as_calibration(batches))
    samples = sample_norms(copy, as_calibration(batches), groups)
    for group in groups:
        reparameterize_norm_(copy, group, *channel_params(samples[group.norm].values(group.norm), 4))
    assert all(p.dtype == torch.bfloat16 for p in copy.parameters())
    off = (logits(copy, batches[0]) - logits(model, batches[0])).float().norm()
    assert off < 0.1 * logits(model, batches[0]).float().norm()


def test_bad_input() -> None:
    model, batches = ZOO["vit"]()
    calibration = as_calibration(batches)
    for wrong, words in (
        ({"rule": "loud"}, "rule 'loud'"),
        ({"k": -1.0}, "k -1"),
        ({"rule": "percentile", "k": 60.0}, "percentile: to 50"),
        ({"bits": 9}, "bits: got 9"),
        ({"shift": "maybe"}, "shift: got 'maybe'"),
    ):
        with pytest.raises(InputError, match=words):
            reparameterize_(structure_copy(model), calibration, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scale: expected numbers from 0"):
        shared_grid(torch.tensor([-1.0]), torch.tensor([0.0]))
    group = find_norm_readers(model, calibration)[0]
    with pytest.raises(InputError, match="expected 32 scales"):
        reparameterize_norm_(structure_copy(model), group, torch.ones(3), torch.zeros(3))
    with pytest.raises(InputError, match="unexpected keyword"):
        prepare_(structure_copy(model), {"reparameterize": {"beta": 1}}, calibration)
    resnet, images = ZOO["resnet"]()
    with pytest.raises(InputError, match="no norm whose output only goes into linear layers"):
        reparameterize_(resnet, as_calibration(images))
    with pytest.raises(InputError, match="calibration"):
        reparameterize_(structure_copy(model), as_calibration([]))
    spoiled = [{"pixel_values": batches[0]["pixel_values"]}]
    broken, _ = ZOO["vit"]()
    with torch.no_grad():
        broken.vit.layers[1].layernorm_before.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"vit\.layers\.1\.layernorm_before.*NaN"):
        reparameterize_(broken, as_calibration(spoiled))
