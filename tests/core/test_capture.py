"""Watching inputs and outputs leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.capture import first_tensor, watch_inputs, watch_outputs
from layerwright.core.layer import get_parameter
from layerwright.core.layers import list_layers
from zoo import ZOO, logits


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_seen_input_times_the_weight_is_what_the_layer_gives(name: str) -> None:
    model, batches = ZOO[name]()
    refs = [ref for ref in list_layers(model) if ref.layout != "none" and ref.block == 0 and ref.kind == "linear"]
    seen: dict[tuple[str, int | None], Tensor] = {}
    given: dict[str, Tensor] = {}
    with torch.no_grad():
        plain = logits(model, batches[0])
        with (
            watch_inputs(model, refs, lambda ref, x, expert: seen.__setitem__((ref.path, expert), x)),
            watch_outputs(model, [ref.path for ref in refs], lambda path, _, y: given.__setitem__(path, y)),
        ):
            watched = logits(model, batches[0])
    assert torch.allclose(plain, watched, atol=1e-5)
    assert {path for path, _ in seen} == {ref.path for ref in refs}
    shapes = {ref.path: ref.shape for ref in refs}
    assert all(x.shape[-1] == shapes[path][1] for (path, _), x in seen.items())
    products = [ref for ref in refs if isinstance(model.get_submodule(ref.path), nn.Linear)]
    assert products
    for ref in products:
        module = model.get_submodule(ref.path)
        wanted = nn.functional.linear(seen[(ref.path, None)], get_parameter(model, ref.parameter), module.bias)
        torch.testing.assert_close(given[ref.path], wanted)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_outputs_and_hooks_after_an_exception() -> None:
    model, batches = ZOO["llama"]()
    found: list[str] = []

    def see(path: str, _args: Any, output: Any) -> None:
        found.append(path)
        assert first_tensor(output).shape[-1] == 32
        raise KeyError

    with pytest.raises(KeyError), watch_outputs(model, ["model.layers.0"], see):
        logits(model, batches[0])
    assert found == ["model.layers.0"]
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(TypeError, match="got int"):
        first_tensor(3)
