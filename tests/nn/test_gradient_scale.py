"""Gradients that are kept or reversed sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerwright.nn.gradient_scale import ConditionalGradientReversal, SelfInterestedClassifier, gradient_scale
from oracles.tdass import self_interested_gradient


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_identity_and_factor_of_each_sample(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    coef = torch.tensor([1.0, -1.0, 0.5, 0.0])
    y = gradient_scale(x, coef)
    assert torch.equal(y, x) and y.dtype == dtype
    above = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    y.backward(above)
    assert x.grad is not None
    for row in range(4):
        assert torch.equal(x.grad[row], above[row] * coef[row].to(dtype))


def test_gradcheck() -> None:
    """The gradient with factors of 1 is the true one; what goes back is linear in what comes, and differentiable."""
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: gradient_scale(z, ones).sin(), (x,))
    assert torch.autograd.gradgradcheck(lambda z: gradient_scale(z, ones).sin(), (x,))
    coef = torch.tensor([2.0, -0.5, -1.0], dtype=torch.float64)
    above = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def back(g: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(gradient_scale(x, coef), x, g, create_graph=True)[0]

    assert torch.autograd.gradcheck(back, (above,))
    assert torch.equal(back(above), above * coef[:, None])
    numeric = torch.autograd.functional.jacobian(lambda z: z.sin().sum(1), x)
    ours = torch.autograd.functional.jacobian(lambda z: gradient_scale(z, coef).sin().sum(1), x)
    assert torch.allclose(ours, numeric * coef[:, None, None])


def test_a_number_is_the_same_for_all() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    gradient_scale(x, -2.0).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3, 2), -2.0))
    with torch.no_grad():
        assert gradient_scale(x, torch.ones(3)) is x


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0, 1),
)
def test_reversal_is_the_oracle(flags: list[bool], target: float, non_target: float, strength: float) -> None:
    draw = torch.Generator().manual_seed(len(flags))
    x = torch.randn(len(flags), 3, generator=draw, dtype=torch.float64).requires_grad_()
    above = torch.randn(len(flags), 3, generator=draw, dtype=torch.float64)
    y = ConditionalGradientReversal(target, non_target)(x, torch.tensor(flags), strength)
    y.backward(above)
    assert x.grad is not None
    assert torch.equal(y, x)
    wanted = self_interested_gradient(above, flags, target, non_target, strength)
    assert torch.allclose(x.grad, wanted, atol=1e-6)  # factors are held in float32


def test_classifier_gets_its_true_gradient_and_features_theirs_by_sample() -> None:
    draw = torch.Generator().manual_seed(3)
    h = torch.randn(6, 4, generator=draw).requires_grad_()
    flags = torch.tensor([True, False, False, True, False, False])
    ours = SelfInterestedClassifier(4, 8, generator=torch.Generator().manual_seed(1))
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plain[0].load_state_dict(ours.inner.state_dict())
    plain[2].load_state_dict(ours.outer.state_dict())
    logits = ours(h, flags, 0.7)
    nn.functional.cross_entropy(logits, flags.long()).backward()
    same = h.detach().clone().requires_grad_()
    assert torch.equal(logits, plain(same))
    nn.functional.cross_entropy(plain(same), flags.long()).backward()
    for own, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None and bool(own.grad.any()) and torch.equal(own.grad, other.grad)
    assert h.grad is not None and same.grad is not None
    assert torch.allclose(h.grad[flags], 0.7 * same.grad[flags])
    assert torch.allclose(h.grad[~flags], -0.7 * same.grad[~flags])


def test_features_of_others_walk_to_the_target() -> None:
    """With a classifier that stands still, a step down the loss makes both kinds look more like the target's."""
    h = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    flags = torch.arange(40) < 10
    model = SelfInterestedClassifier(4, 8)
    before = model(h, flags).log_softmax(1)[:, 1].detach()
    nn.functional.cross_entropy(model(h, flags), flags.long()).backward()
    assert h.grad is not None
    after = model(h.detach() - 0.5 * h.grad, flags).log_softmax(1)[:, 1].detach()
    assert bool((after >= before - 1e-6).all())
    assert float((after - before)[flags].mean()) > 0 and float((after - before)[~flags].mean()) > 0


def test_usual_reversal_and_stopped_target() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    flags = torch.tensor([True, False])
    ConditionalGradientReversal(-1, -1)(x, flags).sum().backward()
    assert x.grad is not None and bool((x.grad == -1).all())
    x.grad = None
    ConditionalGradientReversal(target=0.0)(x, flags).sum().backward()
    assert x.grad is not None
    assert not x.grad[0].any() and bool((x.grad[1] == -1).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradient_scale(torch.ones(3, 2), torch.ones(2)), "coef: got shape"),
        (lambda: gradient_scale(torch.ones(3, 2), torch.ones(3, 1)), "coef: got shape"),
        (lambda: gradient_scale(torch.ones(3), float("nan")), "finite"),
        (lambda: ConditionalGradientReversal(float("inf")), "target: got inf"),
        (lambda: ConditionalGradientReversal()(torch.ones(2, 2), torch.tensor([1, 0])), "is_target: got torch.int64"),
        (lambda: ConditionalGradientReversal()(torch.ones(2, 2), torch.tensor([True])), r"is_target: .*shape \(1,\)"),
        (lambda: ConditionalGradientReversal()(torch.ones(1), torch.tensor([True]), float("nan")), "strength"),
        (lambda: SelfInterestedClassifier(0), "dim: got 0"),
        (lambda: SelfInterestedClassifier(3, classes=1), "classes: got 1"),
        (lambda: SelfInterestedClassifier(3, 4)(torch.ones(2, 4), torch.tensor([True, True])), r"h: .*\(batch, 3\)"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
