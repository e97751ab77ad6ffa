from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.core.treatment import FactorConv
from layerwright.recipes.factor_bench import FactorBench
from layerwright.recipes.prefix_runs import PrefixRuns


class Doubling(nn.Module):
    """Multiplies by a number that can be changed, and counts how often it ran; writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.runs = 2.0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x.mul_(self.factor)


def _chain(children: int = 4) -> nn.Sequential:
    return nn.Sequential(*(Doubling() for _ in range(children)))


def _set(model: nn.Sequential, states: dict[str, float]) -> None:
    for name, child in model.named_children():
        assert isinstance(child, Doubling)
        child.factor = states.get(name, 2.0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.dictionaries(st.sampled_from("0123"), st.sampled_from([3.0, 5.0]), max_size=3)),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([0, 40, 1 << 20]),
)
def test_every_run_is_the_whole_forward(asked: list[tuple[int, dict[str, float]]], limit: int) -> None:
    model = _chain()
    runs = PrefixRuns(model, ["0", "1", "3"], limit)
    inputs = [torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 7.0])]
    for batch, states in asked:
        states.pop("2", None)
        _set(model, states)
        expected = inputs[batch].clone()
        for name in "0123":
            expected = expected * states.get(name, 2.0)
        assert torch.equal(runs.run(inputs[batch].clone(), batch, states), expected)
        assert runs._bytes <= limit


def test_children_before_the_first_difference_are_not_run_again() -> None:
    model = _chain()
    runs = PrefixRuns(model, ["1", "2", "3"])
    x = torch.ones(3)
    runs.run(x.clone(), 0, {})
    runs.run(x.clone(), 0, {"3": 5.0})
    runs.run(x.clone(), 0, {"2": 5.0})
    assert [child.runs for child in model] == [1, 1, 2, 3]
    runs.run(x.clone(), 1, {})
    assert [child.runs for child in model] == [2, 2, 3, 4]


def test_only_plain_chains_suit() -> None:
    class Other(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    hooked = _chain()
    hooked.register_forward_hook(lambda *_: None)
    assert PrefixRuns.suits(_chain())
    assert not any(PrefixRuns.suits(model) for model in (hooked, Other(nn.Identity()), nn.Identity()))


@pytest.mark.parametrize("inplace", [False, True])
def test_bench_measures_the_same_with_and_without_it(inplace: bool) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace)]
    layers += [nn.Sequential(nn.ReLU(inplace), nn.Conv2d(4, 6, 3, padding=1)), nn.BatchNorm2d(6), nn.ReLU(inplace)]
    layers += [nn.Conv2d(6, 6, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).eval()
    data = Calibration([(torch.randn(40, 1, 6, 6), torch.randint(3, (40,)))], name="noise")
    fast, slow = FactorBench(model, data, 10), FactorBench(model, data, 10)
    assert fast._prefix is not None
    slow._prefix = None
    choices = [
        {},
        {"5": (FactorConv(2, "svd", 2, 1, 3, 3),)},
        {"2.1": (FactorConv(2, "svd", 4, 1, 3, 3),)},
        {"2.1": (FactorConv(2, "svd", 4, 1, 3, 3),), "5": (FactorConv(3, "cp", 4, 1, 3, 3),)},
        {"5": (FactorConv(3, "cp", 4, 1, 3, 3),)},
    ]
    for layers_now in choices:
        for batch in range(fast.batches):
            assert fast.batch_accuracy(layers_now, batch) == slow.batch_accuracy(layers_now, batch)
        assert fast.accuracy(layers_now) == slow.accuracy(layers_now)
