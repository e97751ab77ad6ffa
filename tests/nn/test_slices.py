from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layerwright.core.errors import InputError
from layerwright.nn.slices import linear_weight, slice_linear


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Conv1D(4, 6)], ids=["linear", "conv1d"])
def test_a_part_computes_what_the_layer_does_there(layer: nn.Module) -> None:
    x = torch.randn(3, 6)
    x[:, 4:] = 0
    weight, bias = slice_linear(layer, slice(1, 3), 4)
    assert weight.shape == (2, 4) and bias is not None
    torch.testing.assert_close(nn.functional.linear(x[:, :4], weight, bias), layer(x)[:, 1:3])
    rows = torch.tensor([3, 0])
    weight, bias = slice_linear(layer, rows)
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), layer(x)[:, rows])


def test_views_send_gradients_to_their_entries_alone() -> None:
    layer = nn.Linear(5, 4)
    weight, bias = slice_linear(layer, 2, 3)
    assert weight.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
    (weight.square().sum() + bias.sum()).backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None
    assert int(layer.weight.grad.count_nonzero()) == 6
    assert layer.bias.grad.tolist() == [1, 1, 0, 0]


def test_no_bias_and_nothing() -> None:
    layer = nn.Linear(5, 4, bias=False)
    assert slice_linear(layer, 0)[0].shape == (0, 5) and slice_linear(layer, 0)[1] is None
    assert slice_linear(layer)[0] is layer.weight


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"rows: got 9, expected 0 to 4"):
        slice_linear(nn.Linear(5, 4), 9)
    with pytest.raises(InputError, match="adjoining"):
        slice_linear(nn.Linear(5, 4), slice(0, 4, 2))
    with pytest.raises(TypeError, match="Conv2d"):
        linear_weight(nn.Conv2d(1, 1, 1))
