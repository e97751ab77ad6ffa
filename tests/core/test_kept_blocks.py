"""Runs from a block on give what a whole forward gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import as_calibration, logits_of
from layerwright.core.kept_blocks import KeptBlocks
from zoo import ZOO


def whole(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    data = as_calibration(batches)
    with torch.no_grad():
        return [logits_of(data.forward(model, batch)).float().flatten(0, -2) for batch in batches]


@pytest.mark.parametrize("name", ["vit", "swin", "llama", "bert", "t5", "resnet"])
def test_changes_of_one_block_give_the_whole_forward(name: str) -> None:
    model, batches = ZOO[name]()
    model.eval()
    units = [path for stack in find_blocks(model) for path in stack.names]
    runs = KeptBlocks(model, as_calibration(batches), units)
    assert all(torch.equal(a, b) for a, b in zip(runs.keep(), whole(model, batches), strict=True))
    with torch.no_grad():
        for unit in reversed(units):
            weight = next(p for p in model.get_submodule(unit).parameters() if p.dim() > 1)
            weight.mul_(0.7)
            expected = whole(model, batches)
            got = runs.logits(f"{unit}.something")
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            kept = runs.keep(unit)
            assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_work_is_counted_and_halved() -> None:
    model, batches = ZOO["vit"]()
    model.eval()
    units = list(find_blocks(model)[0].names)
    runs = KeptBlocks(model, as_calibration(batches), units)
    runs.keep()
    assert runs.forwards == pytest.approx(1)
    for unit in units:
        runs.logits(unit)
    assert runs.forwards - 1 == pytest.approx((len(units) + 1) / 2)
    assert [runs.position(f"{unit}.x") for unit in units] == list(range(len(units)))
    assert runs.position("elsewhere") == -1


def test_what_cannot_be_kept_is_run_whole() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                for layer in self.layers:
                    x = layer(x)
            return x

    torch.manual_seed(0)
    model, batches = Twice(), [torch.randn(3, 4)]
    runs = KeptBlocks(model, as_calibration(batches), ["layers.0", "layers.1"])
    runs.keep()
    with torch.no_grad():
        model.layers[1].weight.mul_(2)
        torch.testing.assert_close(runs.logits("layers.1")[0], model(batches[0]))
