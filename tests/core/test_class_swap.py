"""Another class in front changes the forward and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.class_swap import restore_class_, swap_class_, swapped
from layerwright.core.errors import InputError
from zoo import ZOO, logits


class Doubled(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward(*args, **kwargs)


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_forward_names_and_restoring() -> None:
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    before, names = layer(x), list(layer.state_dict())
    swap_class_(layer, Doubled)
    assert torch.equal(layer(x), 2 * before)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == names
    assert swapped(layer)
    clone = copy.deepcopy(layer)
    assert type(clone) is type(layer)
    assert torch.equal(clone(x), 2 * before)
    assert clone.weight is not layer.weight
    with pytest.raises(InputError, match="was changed already"):
        swap_class_(layer, Shifted)
    restore_class_(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer(x), before)
    restore_class_(layer)


def test_modules_of_one_class_stay_of_one_class() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    assert swap_class_(first, Doubled) is swap_class_(second, Doubled)
    assert type(first) is not swap_class_(nn.Linear(2, 2), Shifted)


def test_hidden_states_are_recorded_once() -> None:
    model, batches = ZOO["llama"]()
    before = logits(model, batches[0])
    for layer in model.model.layers:
        swap_class_(layer, Doubled)
    states = model(batches[0]["input_ids"], output_hidden_states=True).hidden_states
    assert len(states) == 5
    for layer in model.model.layers:
        restore_class_(layer)
    assert torch.equal(logits(model, batches[0]), before)
