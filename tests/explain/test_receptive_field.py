from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.explain.receptive_field import receptive_field


class _Rows(nn.Module):
    """Sums along rows, channels last; a second output that nobody asks for."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x.sum(2, keepdim=True).expand_as(x), 3


def test_a_convolution_sees_its_kernel() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2)
    found = receptive_field(layer, (2, 3, 9, 11), (2, 3))
    expected = torch.zeros(9, 11, dtype=torch.bool)
    expected[3:8:2, 5:10:2] = True
    assert torch.equal(found > 0, expected)
    corner = receptive_field(layer, (2, 3, 9, 11), (0, 0))
    assert (corner > 0).nonzero().tolist() == [[1, 1], [1, 3], [3, 1], [3, 3]], "the rest lies in the padding"


def test_values_are_the_gradient_of_the_mixture() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, 1).double()
    found = receptive_field(layer, torch.randn(3, 2, 4, 4, dtype=torch.float64), (1, 2), seed=5)
    mixture = torch.randn(4, generator=torch.Generator().manual_seed(5)).double()
    expected = 3 * (layer.weight.detach()[:, :, 0, 0].T @ mixture).abs().sum()
    assert float(found[1, 2]) == pytest.approx(float(expected), rel=1e-6)
    assert float(found.sum()) == pytest.approx(float(expected), rel=1e-6)


def test_layouts_tuples_and_strides() -> None:
    found = receptive_field(_Rows(), (1, 4, 6, 2), (2, 0), channels_last=True)
    assert torch.equal(found > 0, (torch.arange(4) == 2)[:, None].expand(4, 6))
    pooled = receptive_field(nn.AvgPool2d(2), (1, 1, 6, 8), (2, 1))
    assert int((pooled > 0).sum()) == 4 and (pooled[4:, 2:4] == 0.25 * pooled.sum()).all()


def test_a_constant_depends_on_nothing() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(1, 2, 3, 3)

    assert not receptive_field(Constant(), (1, 1, 4, 5), (0, 0)).any()


def test_sums_that_never_change_still_count() -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(1, 4)
    x = torch.randn(1, 4, 3, 3)
    assert (receptive_field(norm, x, (1, 1)) > 0).all()


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout(0.9))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 1, 5, 5)
    with torch.no_grad():
        first = receptive_field(model, images, (2, 2))
    assert torch.equal(first, receptive_field(model, images, (2, 2)))
    assert not first.requires_grad and not images.requires_grad
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert int((first > 0).sum()) == 9


def test_half_precision_models_get_their_own_numbers() -> None:
    found = receptive_field(nn.Conv2d(1, 1, 3).bfloat16(), (1, 1, 5, 5), (0, 0))
    assert found.dtype == torch.bfloat16 and int((found > 0).sum()) == 9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: receptive_field(nn.Identity(), (1, 2, 3), (0, 0)), "images: got shape"),
        (lambda: receptive_field(nn.Flatten(), (1, 2, 3, 3), (0, 0)), "model: gave shape"),
        (lambda: receptive_field(nn.Identity(), (1, 2, 3, 4), (3, 0)), "position"),
        (lambda: receptive_field(nn.Identity(), (1, 2, 3, 4), (0, -1)), "position"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
    with pytest.raises(TypeError, match="int64"):
        receptive_field(nn.Identity(), torch.zeros(1, 1, 2, 2, dtype=torch.long), (0, 0))
