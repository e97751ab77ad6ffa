"""Smoothing norm by norm: a change is made only where it takes a good part of the readers' error away."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from layerwright.core.calibration import Calibration, as_calibration
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.nn.quantizer import fake_quantize, find_scale, mse_clip
from layerwright.treat.migrate import find_norm_readers, migrate_, sample_norms
from layerwright.treat.smooth import LEAST_GAIN, channel_ranges, reader_error, smooth_
from zoo import ZOO, logits


class Pair(nn.Module):
    """Two norms with a reader each: one hands on channels of like size, the other of very different mean and size."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.even, self.first = nn.LayerNorm(channels), nn.Linear(channels, channels)
        self.uneven, self.second = nn.LayerNorm(channels), nn.Linear(channels, channels)
        with torch.no_grad():
            self.uneven.weight.copy_(torch.logspace(-1, 1, channels))
            self.uneven.bias.copy_(torch.linspace(-20, 20, channels).roll(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.uneven(x + self.first(self.even(x))))
        return out


def build() -> tuple[Pair, Calibration]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pair()
    return model, as_calibration(list(torch.randn(96, 16, generator=torch.Generator().manual_seed(1)).split(32)))


def test_only_the_norm_that_needs_it_is_changed() -> None:
    model, data = build()
    chosen, whole = structure_copy(model), structure_copy(model)
    notes = smooth_(chosen, data, shift=True, judge_bits=4)
    smooth_(whole, data, shift=True)
    assert notes == ["even: left as it is", "uneven: shifted and smoothed into second"]
    assert chosen.even.weight is model.even.weight and chosen.first.weight is model.first.weight
    torch.testing.assert_close(chosen.uneven.weight, whole.uneven.weight)
    torch.testing.assert_close(chosen.second.weight, whole.second.weight)
    assert not torch.equal(whole.even.weight, model.even.weight)
    for batch in data:
        torch.testing.assert_close(chosen(batch), model(batch), rtol=1e-4, atol=1e-4)


def test_the_form_of_least_error_is_taken() -> None:
    model, data = build()
    groups = find_norm_readers(model, data)
    uneven = next(group for group in groups if group.norm == "uneven")
    x = sample_norms(model, data, (uneven,))["uneven"].values("uneven")
    low, high = channel_ranges(model, data, (uneven,))["uneven"]
    ones, middle = torch.ones(16), (low + high) / 2
    largest = model.second.weight.abs().amax(0)
    forms = {
        "left": (ones, None),
        "shifted": (ones, middle),
        "smoothed": ((torch.maximum(low.abs(), high.abs()) / largest).sqrt(), None),
        "shifted and smoothed": (((high - low) / 2 / largest).sqrt(), middle),
    }
    errors = {words: reader_error(model, uneven, x, 4, *form) for words, form in forms.items()}
    best = min(errors, key=lambda words: errors[words])
    assert errors[best] < (1 - LEAST_GAIN) * errors["left"]
    note = smooth_(structure_copy(model), data, shift=True, judge_bits=4)[-1]
    assert note.startswith(f"uneven: {best} into")
    # Without a shift to choose from, the best of the rest.
    del errors["shifted"], errors["shifted and smoothed"]
    note = smooth_(structure_copy(model), data, shift=False, judge_bits=4)[-1]
    expected = "smoothed into second" if errors["smoothed"] < (1 - LEAST_GAIN) * errors["left"] else "left as it is"
    assert note == f"uneven: {expected}"


@torch.no_grad()
@pytest.mark.parametrize("shifted", [False, True])
def test_the_error_is_that_of_the_migrated_layer(shifted: bool) -> None:
    model, data = build()
    uneven = next(group for group in find_norm_readers(model, data) if group.norm == "uneven")
    x = sample_norms(model, data, (uneven,))["uneven"].values("uneven")
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(16, generator=generator) + 0.5
    shift = torch.randn(16, generator=generator) if shifted else None
    copy = structure_copy(model)
    migrate_(copy, uneven, scale, shift)
    moved = (x if shift is None else x - shift) / scale
    low, high = float(moved.min().clamp(max=0)), float(moved.max().clamp(min=0))
    best = None
    for i in range(90):
        step = (high - low) * (1 - 0.01 * i) / 15
        zero = max(-8, min(7, round(-8 - low * (1 - 0.01 * i) / step)))
        rounded = ((moved / step).round() + zero).clamp(-8, 7).sub(zero) * step
        error = float((rounded - moved).square().sum())
        if best is None or error < best[0] * (1 - 1e-6):
            best = error, rounded
    assert best is not None
    weight = copy.second.weight.detach()
    rounded_weight = fake_quantize(weight, *find_scale(weight, 4, clip=mse_clip(weight, 4)), 4)
    got = best[1] @ rounded_weight.T + copy.second.bias.detach()
    wanted = moved @ weight.T + copy.second.bias.detach()
    torch.testing.assert_close(wanted, x @ model.second.weight.T + model.second.bias, rtol=1e-3, atol=1e-3)
    slow = (got - wanted).square().sum() / (x @ model.second.weight.T).square().sum()
    assert reader_error(model, uneven, x, 4, scale, shift) == pytest.approx(float(slow), rel=1e-2)


@pytest.mark.parametrize("name", ["deit", "swin"])
def test_models_keep_their_function_whatever_is_chosen(name: str) -> None:
    model, batches = ZOO[name]()
    generator = torch.Generator().manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    with torch.no_grad():
        for norm in itertools.islice(norms, 0, None, 2):
            norm.weight.mul_(torch.randn(len(norm.weight), generator=generator).exp())
            norm.bias.add_(4 * torch.rand(len(norm.bias), generator=generator) - 2)
    copy = structure_copy(model)
    notes = smooth_(copy, as_calibration(batches), shift="auto", judge_bits=3)
    assert len(notes) == len(find_norm_readers(model, as_calibration(batches)))
    assert any("into" in note for note in notes)
    for batch in batches:
        torch.testing.assert_close(logits(copy, batch), logits(model, batch), rtol=0, atol=1e-4)


def test_bad_input() -> None:
    model, data = build()
    for bits in (1, 9, True):
        with pytest.raises(InputError, match="expected a whole number from 2 to 8"):
            smooth_(model, data, judge_bits=bits)
