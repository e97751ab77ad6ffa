from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.p_norm_pool import p_norm_pool
from layerwright.treat.replace_pooling import replace_pooling


def network(pool: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), pool or nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


DATA = [torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))]


def test_a_box_is_average_pooling_exactly() -> None:
    model = network()
    changed = replace_pooling(model, DATA)
    averaged = network()
    averaged[2], averaged[5] = nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1)
    torch.testing.assert_close(changed(DATA[0]), averaged(DATA[0]), atol=1e-6, rtol=1e-5)
    assert isinstance(model[2], nn.MaxPool2d) and changed[0].weight is model[0].weight
    assert isinstance(changed[2], nn.Sequential) and isinstance(changed[2][1], nn.ReLU)
    bare = replace_pooling(model, DATA, ["2"], activation=False)
    assert isinstance(bare[2], nn.Conv2d) and isinstance(bare[5], nn.MaxPool2d)


@pytest.mark.parametrize("kind", ["conv", "stride"])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)])
def test_sizes_stay(kind: str, pool: nn.Module) -> None:
    changed = replace_pooling(network(pool), DATA, kind=kind, init="kaiming")  # type: ignore[arg-type]
    assert changed(DATA[0]).shape == (2, 3)
    assert not any(isinstance(module, nn.MaxPool2d) for module in changed.modules())


def test_a_stride_takes_every_second_position() -> None:
    model = network()
    changed = replace_pooling(model, DATA, ["2"], kind="stride")
    expected = functional.relu(model[0](DATA[0]))[:, :, ::2, ::2]
    torch.testing.assert_close(changed[:3](DATA[0]), expected)
    assert changed[0].weight is model[0].weight and changed[0].stride == (2, 2)


def test_what_cannot_be_replaced_is_named() -> None:
    with pytest.raises(InputError, match="7"):
        replace_pooling(network(), DATA, ["7"])
    with pytest.raises(InputError, match=r"no nn\.MaxPool2d"):
        replace_pooling(nn.Sequential(nn.Conv2d(1, 2, 3)), DATA)
    with pytest.raises(InputError, match="kind"):
        replace_pooling(network(), DATA, kind="mean")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="init"):
        replace_pooling(network(), DATA, init="zeros")  # type: ignore[arg-type]
    odd = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2))
    with pytest.raises(InputError, match=r"gives 5 x 5 where 1 gives 4 x 4"):
        replace_pooling(odd, [torch.zeros(1, 1, 9, 9)], kind="stride")
    apart = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.MaxPool2d(2))
    with pytest.raises(InputError, match="no convolution"):
        replace_pooling(apart, [torch.zeros(1, 1, 8, 8)], ["2"], kind="stride")


def brute(x: Tensor, p: float, size: int, stride: int) -> Tensor:
    rows = [
        [
            (x[:, :, i : i + size, j : j + size].abs() ** p).sum((2, 3)) ** (1 / p)
            for j in range(0, x.shape[3] - size + 1, stride)
        ]
        for i in range(0, x.shape[2] - size + 1, stride)
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@pytest.mark.parametrize("p", [1.0, 2.0, 5.0])
def test_p_norms_are_their_formula(p: float) -> None:
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(p_norm_pool(x, p, 3, 2), brute(x, p, 3, 2))


def test_a_large_p_is_the_maximum() -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 50
    pooled = p_norm_pool(x, 100, 2)
    torch.testing.assert_close(pooled, functional.max_pool2d(x, 2), rtol=0.02, atol=0)
    for bad in ((0.5, 2), (2.0, 9)):
        with pytest.raises(InputError):
            p_norm_pool(x, *bad)
