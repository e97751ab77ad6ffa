"""Planes of scales and weights: the middle is the model, roughness tells smooth from jagged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.explain.scale_landscape import roughness, scale_landscape
from layerwright.studies._vit import build_vit, vit_plan
from layerwright.treat.apply import apply_plan

BLOCK = "vit.layers.1.attention"


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module, list[dict[str, torch.Tensor]]]:
    model = build_vit(hidden_size=16, depth=2, num_heads=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.mul_(6)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 1, 8, 8, generator=g), torch.randint(10, (24,), generator=g)
    data = [{"pixel_values": a, "labels": b} for a, b in zip(x.split(12), y.split(12), strict=True)]
    quantized, _ = apply_plan(model, vit_plan(model, 3, 8, weight_symmetric=False), data)
    return model, quantized, data


def test_roughness_of_known_surfaces() -> None:
    t = torch.linspace(-1, 1, 21, dtype=torch.float64)
    plane = 3 * t[:, None] - t
    bowl = t[:, None] ** 2 + t**2
    noise = torch.rand(21, 21, generator=torch.Generator().manual_seed(0))
    assert roughness(plane) == pytest.approx(0, abs=1e-12) and roughness(torch.ones(3, 3)) == 0
    # The second difference of t^2 is 2 h^2, of a range of 2.
    assert roughness(bowl) == pytest.approx(2 * 0.1**2 / 2)
    assert roughness(noise) > 0.4
    assert roughness(5 * bowl + 7) == pytest.approx(roughness(bowl))


def test_middle_is_the_model_and_scales_are_rougher(pair) -> None:  # type: ignore[no-untyped-def]
    model, quantized, data = pair
    before = {key: value.clone() for key, value in quantized.state_dict().items()}
    scales = scale_landscape(quantized, data, BLOCK, "task", 0.02, 5, reference=model)
    weights = scale_landscape(model, data, BLOCK, "task", 0.02, 5, params="weight")
    assert scales.grid.shape == (5, 5) and scales.steps.tolist() == [-1, -0.5, 0, 0.5, 1]
    calibration = as_calibration(data)
    assert float(scales.grid[2, 2]) == pytest.approx(calibration.mean_loss(quantized), abs=1e-5)
    assert float(weights.grid[2, 2]) == pytest.approx(calibration.mean_loss(model), abs=1e-5)
    assert scales.roughness > 3 * weights.roughness > 0
    assert all(torch.equal(value, before[key]) for key, value in quantized.state_dict().items())
    assert not any(p.requires_grad is False for p in model.parameters())
    same = scale_landscape(quantized, data, BLOCK, "task", 0.02, 5, reference=model)
    other = scale_landscape(quantized, data, BLOCK, "task", 0.02, 5, reference=model, seed=1)
    assert torch.equal(same.grid, scales.grid) and not torch.equal(other.grid, scales.grid)


@pytest.mark.parametrize("loss", ["infonce", "mse", "kl", "cosine"])
def test_losses_against_the_original(pair, loss) -> None:  # type: ignore[no-untyped-def]
    model, quantized, data = pair
    found = scale_landscape(quantized, data, BLOCK, loss, 0.02, 3, reference=model)
    assert found.loss == loss and bool(found.grid.isfinite().all()) and found.roughness > 0


def test_bad_input(pair) -> None:  # type: ignore[no-untyped-def]
    model, quantized, data = pair
    with pytest.raises(InputError, match="n 4"):
        scale_landscape(quantized, data, BLOCK, n=4, reference=model)
    with pytest.raises(InputError, match="radius 0"):
        scale_landscape(quantized, data, BLOCK, radius=0, reference=model)
    with pytest.raises(InputError, match="unknown block"):
        scale_landscape(quantized, data, "vit.layers.9", reference=model)
    with pytest.raises(InputError, match="give reference="):
        scale_landscape(quantized, data, BLOCK)
    with pytest.raises(TypeError, match="no weight scales"):
        scale_landscape(model, data, BLOCK, reference=model)
    with pytest.raises(InputError, match="no weight matrix"):
        scale_landscape(quantized, data, BLOCK, "task", params="weight")
    with pytest.raises(TypeError, match="one label for each row"):
        scale_landscape(quantized, [{"pixel_values": data[0]["pixel_values"]}], BLOCK, "task", n=3)
    with pytest.raises(InputError, match="at least"):
        roughness(torch.zeros(2, 3))
