"""What every vision network keeps to: any size, one graph, bfloat16, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.models.all_cnn import AllCNN
from layerwright.models.backbone import Backbone
from layerwright.models.cswin import CSWinTransformer
from layerwright.models.mlp_mixer import MLPMixer
from layerwright.models.patchconvnet import PatchConvNet
from layerwright.models.rexnet import ReXNet
from layerwright.models.spiralmlp import SpiralMLP
from layerwright.models.swiftformer import SwiftFormer

NETWORKS: dict[str, Callable[[], Any]] = {
    "all-cnn": lambda: AllCNN.from_config("test"),
    "cswin": lambda: CSWinTransformer.from_config("test"),
    "patchconvnet": lambda: PatchConvNet.from_config("test"),
    "rexnet": lambda: ReXNet.from_config("test"),
    "spiralmlp": lambda: SpiralMLP.from_config("test"),
    "swiftformer": lambda: SwiftFormer.from_config("test"),
    "mixer": lambda: MLPMixer.from_config("test", num_classes=10),
}
BACKBONES = [name for name in NETWORKS if name not in ("all-cnn", "mixer")]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = NETWORKS[name]()
    return made.eval()


def pictures(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# The others are compiled beside their own parts.
@pytest.mark.parametrize("name", ["all-cnn", "mixer", "spiralmlp"])
def test_one_graph_and_bfloat16(name: str) -> None:
    model, images = network(name), pictures(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), logits)
        half = model.bfloat16()(images.bfloat16())
    assert logits.shape == (2, 10) and half.dtype == torch.bfloat16
    assert (half.float() - logits).abs().max() < 0.1 * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_of_any_size_have_the_strides_that_are_told(name: str) -> None:
    model: Any = network(name)
    assert isinstance(model, Backbone)
    maps = model.forward_features(pictures(1, 3, 45, 70))
    assert len(maps) == len(model.feature_strides) == len(model.feature_channels)
    for found, stride, channels in zip(maps, model.feature_strides, model.feature_channels, strict=True):
        assert found.shape[1] == channels
        for side, pixels in zip(found.shape[2:], (45, 70), strict=True):
            assert pixels // stride <= side <= -(-pixels // stride)
    assert model.num_features == model.feature_channels[-1] or name == "rexnet"
    assert model.no_weight_decay() <= {parameter for parameter, _ in model.named_parameters()}
    model.reset_classifier(3)
    assert model(pictures(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("name", BACKBONES)
def test_pictures_that_are_none_are_named(name: str) -> None:
    model = network(name)
    with pytest.raises(TypeError, match="images"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    for shape in ((0, 3, 64, 64), (1, 5, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match="images"):
            model(torch.zeros(shape))
