"""Linear layers in bfloat16 by way of float32: same numbers, only where it pays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.core import products


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_tiles", lambda: False)


def called_with(module: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Dtypes in which `F.linear` really multiplies below the mode."""
    seen: list[torch.dtype] = []

    class Below(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is nn.functional.linear:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Below(), torch.no_grad(), products.fast_products():
        module(x)
    return seen


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_bfloat16_rounded_once(without_tiles: None, bias: bool) -> None:
    layer = nn.Linear(96, 80, bias=bias).bfloat16()
    x = torch.randn(4, 40, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        with products.fast_products():
            fast = layer(x)
        native = layer(x)
    assert fast.dtype == torch.bfloat16
    # Half a unit in the last place of bfloat16 is at most 2^-8 of the value.
    bound = exact.abs() * 2**-8 + 1e-6
    assert ((fast.double() - exact).abs() <= bound).all()
    assert (fast.double() - exact).abs().mean() <= (native.double() - exact).abs().mean() * 1.001


def test_only_where_it_pays(without_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(32, 32).bfloat16()
    assert called_with(layer, torch.zeros(64, 32).bfloat16(), monkeypatch) == [torch.float32]
    assert called_with(layer, torch.zeros(63, 32).bfloat16(), monkeypatch) == [torch.bfloat16]
    assert called_with(nn.Linear(32, 32), torch.zeros(64, 32), monkeypatch) == [torch.float32]
    monkeypatch.setattr(products, "_has_tiles", lambda: True)
    assert called_with(layer, torch.zeros(64, 32).bfloat16(), monkeypatch) == [torch.bfloat16]


def test_gradients_keep_their_dtype(without_tiles: None) -> None:
    layer = nn.Linear(32, 32).bfloat16()
    with products.fast_products():
        out = layer(torch.zeros(64, 32).bfloat16())
    assert out.grad_fn is not None and "ToCopy" not in type(out.grad_fn).__name__
