from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.explain.aggregation_map import aggregation_maps
from layerwright.models.patchconvnet import PatchConvNet
from layerwright.nn.learned_aggregation import ClassAttentionHead, LearnedAggregation
from layerwright.treat.swap_pooling import swap_pooling


def _net(**more: Any) -> Any:
    torch.manual_seed(0)
    model = PatchConvNet(16, 1, 5, stride=4, layer_scale=1.0, drop_path_rate=0.5, **more)
    with torch.no_grad():
        for projection in (model.head.aggregation.q_proj, model.head.aggregation.k_proj):  # type: ignore[union-attr]
            projection.weight.mul_(40)  # type: ignore[union-attr, operator]
    return model.train()


@torch.no_grad()
def test_maps_are_the_weights_of_the_pass() -> None:
    model, images = _net(num_heads=2), torch.randn(2, 3, 24, 20)
    maps = aggregation_maps(model, images)
    assert maps.shape == (2, 6, 5) and model.training and not model.head.aggregation._forward_hooks
    model.eval()
    _, weights = model.head(model.forward_features(images)[0], return_attention=True)
    torch.testing.assert_close(maps, weights.mean(1).reshape(2, 6, 5))
    total = maps.sum((1, 2))
    assert (total < 0.999).all()
    renormalised = aggregation_maps(model, images, renormalise=True)
    torch.testing.assert_close(renormalised, maps / total[:, None, None])
    assert maps.std() > 1e-3, "maps that differ from place to place"


@torch.no_grad()
def test_one_map_for_each_class_and_at_the_size_of_the_pictures() -> None:
    model, images = _net(per_class=True), torch.randn(2, 3, 24, 20)
    maps = aggregation_maps(model, images)
    assert maps.shape == (2, 5, 6, 5)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 5))
    large = aggregation_maps(model, images, "head.aggregation", upsample=True)
    torch.testing.assert_close(large, functional.interpolate(maps, size=(24, 20), mode="bilinear"))
    shares = aggregation_maps(model, images, upsample=True, renormalise=True)
    torch.testing.assert_close(shares.sum((2, 3)), torch.ones(2, 5))


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 4, 4), ClassAttentionHead(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(images).flatten(2).transpose(1, 2))
        return logits


@torch.no_grad()
def test_tokens_are_laid_out_in_a_grid() -> None:
    model, images = _Tokens(), torch.randn(1, 3, 8, 32)
    assert aggregation_maps(model, images, grid=(2, 8)).shape == (1, 2, 8)
    assert aggregation_maps(model, images).shape == (1, 4, 4)
    with pytest.raises(InputError, match="product is 16"):
        aggregation_maps(model, images, grid=(3, 5))
    with pytest.raises(InputError, match="product is 15"):
        aggregation_maps(model, torch.randn(1, 3, 12, 20))


@torch.no_grad()
def test_any_network_whose_pooling_was_swapped() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    images = torch.randn(2, 3, 9, 8)
    with pytest.raises(InputError, match="no LearnedAggregation"):
        aggregation_maps(net, images)
    assert aggregation_maps(swap_pooling(net, "2", [images]), images).shape == (2, 7, 6)


def test_which_one_must_be_clear() -> None:
    two = nn.ModuleDict({"a": LearnedAggregation(4), "b": LearnedAggregation(4)})
    with pytest.raises(InputError, match="expected one of a, b"):
        aggregation_maps(two, torch.zeros(1, 4, 2, 2))
    with pytest.raises(InputError, match="unknown aggregation 'c'"):
        aggregation_maps(two, torch.zeros(1, 4, 2, 2), "c")

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = LearnedAggregation(4)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(InputError, match="unused does not run"):
        aggregation_maps(Idle(), torch.zeros(1, 4, 2, 2))
