from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.rel_pos_patch_attention import RelPosPatchAttention, ShiftedPatchProducts
from layerwright.treat.swap_convolution import SwappedConvolution, swap_convolution


def network(**more: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, **more), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), nn.Conv2d(8, 6, 5, padding=2, bias=False)),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).eval()  # fmt: skip


IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
NAMES = ["0", "4.0", "4.1"]


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("shifts", [False, True])
def test_outputs_stay_and_the_model_too(patch: int, shifts: bool) -> None:
    model = network()
    before = model(IMAGES)
    maps = model[:5](IMAGES)
    swapped = swap_convolution(model, NAMES, patch, shifts=shifts)
    torch.testing.assert_close(swapped[:5](IMAGES), maps, atol=1e-4, rtol=0)
    torch.testing.assert_close(swapped(IMAGES), before, atol=1e-4, rtol=0)
    assert isinstance(model[0], nn.Conv2d) and not any(isinstance(m, nn.Conv2d) for m in swapped.modules())
    kind = ShiftedPatchProducts if shifts else RelPosPatchAttention
    assert sum(isinstance(m, kind) for m in swapped.modules()) == 3
    assert swapped[8].weight is model[8].weight and not swapped[0].training


@torch.no_grad()
@pytest.mark.parametrize("size", [(13, 15), (3, 2), (5, 16)])
def test_maps_of_any_size_are_filled_up(size: tuple[int, int]) -> None:
    conv = nn.Conv2d(3, 4, 5, padding=2)
    swapped: Any = swap_convolution(nn.Sequential(conv), "0", 4)
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(swapped(images), conv(images), atol=1e-4, rtol=0)
    torch.testing.assert_close(swapped(images[0]), conv(images[0]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_circular_convolutions_need_whole_patches() -> None:
    model = network(padding_mode="circular")
    swapped = swap_convolution(model, "0", 4)
    torch.testing.assert_close(swapped(IMAGES), model(IMAGES), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="patch: got 4 for maps of 15 x 16"):
        swapped(torch.zeros(1, 3, 15, 16))


def test_it_can_be_trained_on() -> None:
    model = network()
    swapped = swap_convolution(model, "0", 4, sharpness=6, content=True, border="null_token")
    first: Any = swapped[0]
    assert isinstance(first, SwappedConvolution)
    swapped.train()(IMAGES).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in first.attention.parameters()
        if p is not first.attention.key.weight
    )
    assert first.attention.bias_table.grad.abs().max() > 0
    again = swap_convolution(model, "0", 4, copy=False)
    assert again is model and isinstance(model[0], SwappedConvolution)


@torch.no_grad()
def test_it_compiles_and_keeps_its_precision() -> None:
    swapped = swap_convolution(network().bfloat16(), NAMES, 4)
    assert swapped(IMAGES.bfloat16()).dtype == torch.bfloat16
    single = swap_convolution(network(), NAMES, 4)
    compiled = torch.compile(single, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), single(IMAGES))


def test_what_cannot_be_swapped_is_named() -> None:
    with pytest.raises(InputError, match=r"did you mean .*4\.0"):
        swap_convolution(network(), "4.00", 4)
    with pytest.raises(TypeError, match="8: conv: got Linear"):
        swap_convolution(network(), "8", 4)
    with pytest.raises(InputError, match="0: conv: got stride"):
        swap_convolution(nn.Sequential(nn.Conv2d(2, 2, 3, 2, 1)), "0", 4)
    with pytest.raises(InputError, match="0: tolerance"):
        swap_convolution(network(), "0", 4, sharpness=6, shifts=True)
    with pytest.raises(InputError, match="x: got shape"):
        swap_convolution(network(), "0", 4)[0](Tensor(2, 2, 3, 8, 8))
