from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.nn.ebv_head import EBVHead
from layerwright.nn.equiangular import generate_ebv
from layerwright.treat.swap_classifier import swap_classifier


class Network(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU())
        self.heads = nn.ModuleDict({"main": nn.Linear(12, 7, bias=bias)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads["main"](self.body(x))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
def test_orthonormal_vectors_give_the_old_answers(bias: bool) -> None:
    model, x = Network(bias).eval(), torch.randn(500, 6)
    state = copy.deepcopy(model.state_dict())
    swapped = swap_classifier(model, "heads.main", EBVHead(12, 7, reserve=2))
    assert torch.equal(swapped(x).argmax(1), model(x).argmax(1))
    assert isinstance(model.heads["main"], nn.Linear)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert swapped.body[0].weight is model.body[0].weight
    assert not swapped.heads["main"].training
    assert swapped(x).shape == (500, 7)


def test_fewer_dimensions_keep_sure_answers() -> None:
    old = nn.Linear(7, 7)
    old.weight.data = 3 + torch.eye(7)  # what all classes have in common must not matter
    old.bias.data += 100
    answers = torch.arange(7).repeat(20)
    x = torch.eye(7)[answers] + 0.05 * torch.randn(140, 7)
    assert torch.equal(old(x).argmax(1), answers)
    vectors = generate_ebv(7, 5, steps=300).vectors
    fitted = swap_classifier(old, "", EBVHead(7, 7, vectors=vectors))
    own = swap_classifier(old, "", EBVHead(7, 7, vectors=vectors), fit=False)
    share = [float((m(x).argmax(1) == answers).float().mean()) for m in (fitted, own)]
    assert share[0] > 0.95 and share[1] < 0.5
    # Least squares: what is left over is at right angles to the vectors.
    left = (vectors @ fitted.fc.weight - (old.weight - old.weight.mean(0))).detach()
    assert float((vectors.T @ left).abs().max()) < 1e-5 < 0.1 < float(left.abs().max())


def test_dtype_more_classes_and_changing_in_place() -> None:
    model = Network().bfloat16()
    head = EBVHead(12, 9)
    assert swap_classifier(model, "heads.main", head, copy=False) is model
    assert model.heads["main"] is head and head.fc.weight.dtype == torch.bfloat16
    assert head.vectors.dtype == torch.float32
    assert model(torch.randn(2, 6).bfloat16()).shape == (2, 9)
    linear = nn.Linear(12, 7)
    assert swap_classifier(linear, "", head2 := EBVHead(12, 7)) is head2


def test_bad_input() -> None:
    model = Network()
    with pytest.raises(InputError, match=r"unknown linear layer 'heads.man'; did you mean heads.main"):
        swap_classifier(model, "heads.man", EBVHead(12, 7))
    with pytest.raises(InputError, match="unknown linear layer"):
        swap_classifier(model, "body.1", EBVHead(12, 7))
    with pytest.raises(InputError, match="head: takes 11 features and has 7 classes, expected 12 and at least 7"):
        swap_classifier(model, "heads.main", EBVHead(11, 7))
    with pytest.raises(InputError, match=r"head: has no bias, but heads\.main has"):
        swap_classifier(model, "heads.main", EBVHead(12, 7, bias=False))
    with pytest.raises(InputError, match="has 6 classes"):
        swap_classifier(model, "heads.main", EBVHead(12, 6))
