from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.learned_aggregation import LearnedAggregation
from layerwright.treat.swap_pooling import AggregatedPool, swap_pooling

DATA = [torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(0))]


def _net(pool: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), pool or nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d((1, 1)), nn.AvgPool2d((5, 4))])
def test_it_starts_as_the_pool_that_was_there(pool: nn.Module) -> None:
    model = _net(pool)
    before = model(DATA[0])
    swapped = swap_pooling(model, "3", DATA)
    new = swapped.get_submodule("3")
    assert isinstance(new, AggregatedPool) and isinstance(new.aggregation, LearnedAggregation)
    assert torch.equal(swapped(DATA[0]), before)
    assert model[3] is pool and torch.equal(model(DATA[0]), before)
    assert swapped.get_parameter("5.weight") is model[5].weight
    assert new(torch.randn(2, 6, 5, 4)).shape == (2, 6, 1, 1)
    with torch.no_grad():
        new.gate.fill_(0.5)  # type: ignore[union-attr]
    x = model[:3](DATA[0])
    expected = model[5](pool(x)[:, :, 0, 0] + 0.5 * new.aggregation(x)[:, 0])
    torch.testing.assert_close(swapped(DATA[0]), expected)
    assert (expected - before).abs().max() > 1e-4


def test_the_gate_opens_and_the_aggregation_learns() -> None:
    model = _net().requires_grad_(False)
    swapped = swap_pooling(model, "3", DATA)
    target = torch.randint(5, (4,), generator=torch.Generator().manual_seed(1))
    trained = [p for p in swapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(swapped(DATA[0]), target)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    new: Any = swapped.get_submodule("3")
    assert losses[-1] < 0.5 * losses[0]
    assert new.gate.abs().max() > 0.01 and new.aggregation.q_proj.weight.grad.abs().max() > 0
    assert len(trained) == 1 + sum(1 for _ in new.aggregation.parameters())


@torch.no_grad()
def test_it_may_stand_alone_and_in_place() -> None:
    model = _net().bfloat16().train()
    data = [DATA[0].bfloat16()]
    result = swap_pooling(model, "3", data, lambda dim: LearnedAggregation(dim, 2), keep_pool=False, copy=False)
    new: Any = model[3]
    assert result is model and new.gate is None and new.aggregation.num_heads == 2 and new.training
    assert new.aggregation.queries.dtype == torch.bfloat16
    x = model[:3](data[0])
    torch.testing.assert_close(model(data[0]), model[5](new.aggregation(x)[:, 0]))


@torch.no_grad()
def test_a_pool_that_flattens_keeps_its_shape() -> None:
    class MeanPool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    model = nn.Sequential(nn.Conv2d(3, 6, 3), MeanPool(), nn.Linear(6, 2))
    swapped = swap_pooling(model, "1", DATA)
    assert swapped(DATA[0]).shape == (4, 2) and torch.equal(swapped(DATA[0]), model(DATA[0]))
    torch.testing.assert_close(torch.compile(swapped, fullgraph=True, backend="eager")(DATA[0]), model(DATA[0]))


@torch.no_grad()
def test_a_residual_network_of_transformers_answers_as_before() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).eval()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    (name,) = (n for n, m in model.named_modules() if isinstance(m, nn.AdaptiveAvgPool2d))
    swapped = swap_pooling(model, name, [batch])
    assert torch.equal(swapped(**batch).logits, model(**batch).logits)
    assert swapped.get_submodule(name).aggregation.dim == 12  # type: ignore[union-attr]


class _Twice(nn.Module):
    """One pool for maps of two widths, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.avgpool, self.idle_pool = nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([self.avgpool(x), self.avgpool(self.second(x))], 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swap_pooling(_net(), "pool", DATA), "unknown pooling module 'pool'.*2, 3"),
        (lambda: swap_pooling(_net(), "0", DATA), "0 is a Conv2d, expected one of 2, 3"),
        (lambda: swap_pooling(_net(), "", DATA), "unknown pooling module ''.*2, 3"),
        (lambda: swap_pooling(_net(), "2", DATA), r"gives \(4, 6, 5, 4\), expected one position"),
        (lambda: swap_pooling(nn.Sequential(nn.Conv2d(3, 2, 3)), "0", DATA), "no pooling module"),
        (lambda: swap_pooling(_Twice(), "avgpol", DATA), "did you mean avgpool"),
        (lambda: swap_pooling(_Twice(), "avgpool", DATA), r"maps of \[4, 6\] channels"),
        (lambda: swap_pooling(_Twice(), "idle_pool", DATA), "idle_pool does not run"),
        (
            lambda: swap_pooling(_net(), "3", DATA, lambda dim: LearnedAggregation(dim, num_queries=2)),
            r"head: gives \(4, 2, 6\), expected one token",
        ),
        (lambda: swap_pooling(swap_pooling(_net(), "3", DATA), "3", DATA), "3 is a AggregatedPool, expected one of 2"),
    ],
)
def test_what_cannot_be_swapped_is_named(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
