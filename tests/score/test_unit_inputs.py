"""A block is run only as far as the last layer whose input is wanted, and the statistics are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration
from layerwright.core.layers import treatable
from layerwright.score.inputs import walk_inputs


class Block(nn.Module):
    """Two layers; the second runs `repeats` times, and `after` counts how often the end of the block is reached."""

    def __init__(self, repeats: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.repeats = repeats
        self.after = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        for _ in range(self.repeats):
            y = self.second(y)
        self.after += 1
        return x + y


class Net(nn.Module):
    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(repeats) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(("repeats", "runs"), [(1, 1 + 4), (2, 4 + 4)])
def test_stops_after_the_last_input(repeats: int, runs: int) -> None:
    torch.manual_seed(0)
    model = Net(repeats)
    batches = [torch.randn(5, 8) for _ in range(4)]
    refs = treatable(model)
    expected: dict[str, Tensor] = {}

    def hook(path: str):  # type: ignore[no-untyped-def]
        def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].double()
            expected[path] = expected.get(path, torch.zeros(8, 8, dtype=torch.float64)) + x.T @ x

        return see

    handles = [model.get_submodule(ref.path).register_forward_pre_hook(hook(ref.path)) for ref in refs]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    for block in model.layers:
        block.after = 0

    calibration = as_calibration([{"x": batch} for batch in batches])
    found: dict[str, Tensor] = {}
    for inside, inputs in walk_inputs(model, calibration, refs, {ref.path: "gram" for ref in refs}):
        found |= {ref.path: inputs.of[ref.path].gram[0] for ref in inside}
    assert set(found) == set(expected)
    for path, gram in found.items():
        torch.testing.assert_close(gram.double(), expected[path], rtol=1e-5, atol=1e-5)
    # One run to see that each layer runs once, then none to the end; and one that goes on to the next block.
    assert [block.after for block in model.layers[:2]] == [runs, runs]
