from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.models.all_cnn import KINDS, AllCNN
from layerwright.models.backbone import Backbone, count_macs


@pytest.mark.parametrize(
    ("variant", "base", "more"), [("A", 839_242, 1_254_250), ("B", 885_610, 1_300_618), ("C", 954_730, 1_369_738)]
)
def test_parameters_are_those_of_the_layer_tables(variant: str, base: int, more: int) -> None:
    found = {kind: sum(p.numel() for p in AllCNN(variant, kind).parameters()) for kind in KINDS}  # type: ignore[arg-type]
    assert found == {"base": base, "strided": base, "convpool": more, "all": more}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_every_kind_ends_with_six_by_six(variant: str, kind: str) -> None:
    model = AllCNN.from_config(f"{variant.lower()}_{kind}", width_mult=0.1).eval()
    assert isinstance(model, Backbone)
    maps = model.forward_features(torch.randn(2, 3, 32, 32))[0]
    assert maps.shape == (2, 10, 6, 6) and maps.min() >= 0
    torch.testing.assert_close(
        model(torch.ones(1, 3, 32, 32)), model.forward_features(torch.ones(1, 3, 32, 32))[0].mean((2, 3))
    )
    assert model(torch.randn(1, 3, 37, 29)).shape == (1, 10)
    model.reset_classifier(4)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)


def test_operations_dropout_and_the_last_relu() -> None:
    assert count_macs(AllCNN("C"), 32) == pytest.approx(270.8e6, rel=1e-3)
    model = AllCNN("C", width_mult=0.1)
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.2, 0.5, 0.5]
    signed = AllCNN("C", width_mult=0.1, final_relu=False).eval()
    assert signed.forward_features(torch.randn(4, 3, 32, 32))[0].min() < 0
    assert sum(isinstance(module, nn.ReLU) for module in model.layers) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "D"}, "variant"),
        ({"kind": "pool"}, "kind"),
        ({"num_classes": 0}, "num_classes"),
        ({"width_mult": 0.001}, "width_mult"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AllCNN(**settings)  # type: ignore[arg-type]


def test_bad_pictures_are_named() -> None:
    model = AllCNN.from_config("test")
    with pytest.raises(InputError, match="at least 16"):
        model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="3 channels"):
        model(torch.zeros(3, 32, 32))
    with pytest.raises(InputError, match="expected one of a_base"):
        AllCNN.from_config("resnet")
