from __future__ import annotations

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.models.backbone import Backbone
from layerwright.models.mlp_mixer import MLPMixer


def test_a_mixer_is_a_backbone() -> None:
    model = MLPMixer.from_config("test", num_classes=7).eval()
    assert isinstance(model, Backbone)
    x = torch.randn(2, 3, 32, 32)
    maps = model.forward_features(x)[0]
    assert maps.shape == (2, 24, 4, 4)
    torch.testing.assert_close(model(x), model.head(maps.mean((2, 3))))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.no_weight_decay() == set()
    with torch.device("meta"):
        large = MLPMixer.from_config("b16")
    assert sum(p.numel() for p in large.parameters()) == 59_880_472


def test_bad_input_is_named() -> None:
    model = MLPMixer.from_config("test")
    for make, message in (
        (lambda: MLPMixer(30, 16), "patch"),
        (lambda: MLPMixer(32, 16, num_classes=0), "num_classes"),
        (lambda: MLPMixer.from_config("x16"), "s16, b16"),
        (lambda: model(torch.randn(1, 3, 40, 32)), "32 x 32"),
        (lambda: model(torch.randn(1, 1, 32, 32)), "3 channels"),
    ):
        with pytest.raises(InputError, match=message):
            make()
