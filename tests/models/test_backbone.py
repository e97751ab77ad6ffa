from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.core.errors import CheckpointError, InputError
from layerwright.models.backbone import check_images, count_macs, load_official_, named_config, start_, translate_keys


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(4 * 16, 5))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_multiply_adds_are_those_of_the_formula(device: str) -> None:
    assert count_macs(small().to(device), 8) == 16 * 4 * 27 + 64 * 5


def test_attention_is_counted_on_the_meta_device_too() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = self.fc(x.flatten(2).mT[..., :1].expand(-1, -1, 8)).unflatten(-1, (2, 4)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(rows, rows, rows)

    expected = 16 * 64 + 2 * 16 * 16 * 8
    assert count_macs(Attends(), 4) == count_macs(Attends().to("meta"), 4) == expected


def test_official_weights_are_copied_whole_or_not_at_all() -> None:
    source, model = small(), small()
    nn.init.normal_(source[0].weight)
    state = {f"module.{'stem' if name[0] == '0' else 'head'}.{name[2:]}": t for name, t in source.state_dict().items()}
    state["module.counter"] = torch.zeros(1)
    rules = [(r"^module\.", ""), (r"^stem\.", "0."), (r"^head\.", "2.")]
    load_official_(model, state, rules, ignored="counter$")
    assert torch.equal(model[0].weight, source[0].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for change, message in (
        ({"module.counter": torch.zeros(1)}, "1 unexpected"),
        ({"module.head.weight": torch.zeros(7, 64)}, r"1 of another shape \(2.weight: \(7, 64\) for \(5, 64\)\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_official_(
                model, {**state, **change}, rules, ignored="counter$" if "head" in str(change.keys()) else ""
            )
    del state["module.stem.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(0.bias\)"):
        load_official_(model, state, rules, ignored="counter$")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(InputError, match="several become x"):
        translate_keys(["a", "b"], [("[ab]", "x")])


def test_bad_pictures_are_named() -> None:
    check_images(torch.zeros(1, 3, 32, 32), 3, 32)
    with pytest.raises(TypeError, match="int64"):
        check_images(torch.zeros(1, 3, 8, 8, dtype=torch.long), 3)
    for shape, message in (
        ((3, 8, 8), "3 channels"),
        ((1, 1, 8, 8), "3 channels"),
        ((0, 3, 8, 8), "empty"),
        ((1, 3, 8, 4), "at least 5"),
    ):
        with pytest.raises(InputError, match=message):
            check_images(torch.zeros(shape), 3, 5)
    with pytest.raises(InputError, match="expected one of tiny, base"):
        named_config("huge", {"tiny": {}, "base": {}}, {})
    assert named_config("tiny", {"tiny": {"dim": 4, "depth": 2}}, {"depth": 3}) == {"dim": 4, "depth": 3}


def test_first_weights_are_small_and_convolutions_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(400, 50))
    before = model[0].weight.clone()
    start_(model)
    assert float(model[2].weight.detach().std()) == pytest.approx(0.02, rel=0.1) and not model[2].bias.any()
    assert torch.equal(model[0].weight, before)
    start_(model, convolutions=True)
    assert not torch.equal(model[0].weight, before)
