"""The alpha-divergence against its closed form and its limits, on distributions and on lattices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwright.nn.transducer import collapse_lattice, lattice_mask
from layerwright.tune.alpha_divergence import alpha_divergence, lattice_divergence


def logits(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def closed_form(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    q, p = student.softmax(-1), teacher.softmax(-1)
    if alpha == 1:
        return (p * (p / q).log()).sum(-1)
    if alpha == 0:
        return (q * (q / p).log()).sum(-1)
    return (q * ((p / q) ** alpha - 1)).sum(-1) / (alpha * (alpha - 1))


ALPHAS = [-1.0, 0.0, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_value_and_gradient_of_the_closed_form(alpha: float) -> None:
    student, teacher = logits(0, 5, 4, scale=0.3).requires_grad_(), logits(1, 5, 4, scale=0.3).requires_grad_()
    found = alpha_divergence(student, teacher, alpha, alpha, clip=1e6, reduction="none")
    expected = closed_form(student, teacher, alpha)
    assert torch.allclose(found, expected, atol=1e-12)
    weights = torch.arange(1.0, 6.0).double()
    (gradient,) = torch.autograd.grad((weights * found).sum(), student, retain_graph=True)
    (exact,) = torch.autograd.grad((weights * expected).sum(), student)
    assert torch.allclose(gradient, exact, atol=1e-10)
    found.sum().backward()
    assert teacher.grad is None  # it learns nothing


@pytest.mark.parametrize("alpha", ALPHAS)
def test_nothing_of_itself(alpha: float) -> None:
    p = logits(0, 3, 5).requires_grad_()
    found = alpha_divergence(p, p.detach(), alpha, alpha, reduction="none")
    assert torch.allclose(found, torch.zeros(3).double(), atol=1e-12)
    found.sum().backward()
    assert p.grad is not None and float(p.grad.abs().max()) < 1e-12


@pytest.mark.parametrize(("alpha", "limit"), [(1 + 1e-4, 1.0), (1 - 1e-4, 1.0), (1e-4, 0.0), (-1e-4, 0.0)])
def test_limits_are_the_kullback_leibler_divergences(alpha: float, limit: float) -> None:
    student, teacher = logits(2, 6, 4), logits(3, 6, 4)
    near = alpha_divergence(student, teacher, alpha, alpha, clip=1e6, reduction="none")
    at = alpha_divergence(student, teacher, limit, limit, reduction="none")
    assert torch.allclose(near, at, atol=5e-4)
    assert torch.allclose(at, closed_form(student, teacher, limit))


def test_the_larger_one_is_taken_at_each_position() -> None:
    student, teacher = logits(4, 40, 3).requires_grad_(), logits(5, 40, 3)
    both = alpha_divergence(student, teacher, -1, 1, clip=1e6, reduction="none")
    low, high = (alpha_divergence(student, teacher, a, a, clip=1e6, reduction="none") for a in (-1.0, 1.0))
    assert torch.equal(both, torch.maximum(low, high))
    taken = low > high
    assert bool(taken.any()) and not bool(taken.all())
    gradients = [torch.autograd.grad(v.sum(), student, retain_graph=True)[0] for v in (both, low, high)]
    assert torch.equal(gradients[0], torch.where(taken[:, None], gradients[1], gradients[2]))


def test_clipping_bounds_the_weights() -> None:
    # A student that is sure of what its teacher does not think possible: t^-1 is enormous.
    student = torch.tensor([[8.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-8.0, 0.0, 0.0]], dtype=torch.float64)
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    clipped = (p / q).pow(-1).clamp(max=5)
    found = alpha_divergence(student, teacher, -1, -1, clip=5, reduction="none")
    assert torch.allclose(found, (q * (clipped - 1)).sum(-1) / 2)
    found.sum().backward()
    surrogate = q * clipped  # gradient of sum_i q_i clip_i log softmax(z)_i, held factors
    assert student.grad is not None
    assert torch.allclose(student.grad, surrogate - q * surrogate.sum())
    huge = alpha_divergence(1e4 * student.detach(), teacher, -1, 1)
    assert bool(huge.isfinite())


@given(st.integers(0, 500), st.floats(0.1, 20), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_finite_whatever_is_given(seed: int, scale: float, dtype: torch.dtype) -> None:
    student = logits(seed, 3, 4, scale=scale).to(dtype).requires_grad_()
    loss = alpha_divergence(student, logits(seed + 1, 3, 4, scale=scale).to(dtype))
    loss.backward()
    assert loss.dtype == torch.float32 and bool(loss.isfinite())
    assert student.grad is not None and bool(student.grad.isfinite().all())


def test_reductions() -> None:
    student, teacher = logits(0, 2, 3, 4), logits(1, 2, 3, 4)
    each = alpha_divergence(student, teacher, reduction="none")
    assert each.shape == (2, 3)
    assert torch.equal(alpha_divergence(student, teacher), each.mean())
    assert torch.equal(alpha_divergence(student, teacher, reduction="sum"), each.sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_min": 1.0, "alpha_max": 0.5}, "alpha_min"),
        ({"alpha_max": float("nan")}, "alpha_min"),
        ({"clip": 0.0}, "clip"),
        ({"clip": -1.0}, "clip"),
        ({"reduction": "median"}, "reduction"),
        ({"teacher_logits": torch.zeros(2, 3)}, "same shape"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"student_logits": torch.zeros(2, 4), "teacher_logits": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=message):
        alpha_divergence(**(good | options))


def test_lattices() -> None:
    student, teacher = logits(0, 3, 4, 3, 5).requires_grad_(), logits(1, 3, 4, 3, 5).requires_grad_()
    targets = torch.tensor([[1, 2], [4, 4], [3, 1]])
    lengths = torch.tensor([4, 2, 1]), torch.tensor([2, 0, 1])
    found = lattice_divergence(student, teacher, targets, *lengths)
    total = 0.0
    collapsed = [collapse_lattice(each, targets, lengths[1]).detach() for each in (student, teacher)]
    for n, t, u in lattice_mask(student, *lengths).nonzero().tolist():
        total += float(alpha_divergence(collapsed[0][n, t, u], collapsed[1][n, t, u]))
    assert float(found.detach()) == pytest.approx(total / 3)
    found.backward()
    assert teacher.grad is None and student.grad is not None
    inside = lattice_mask(student, *lengths)
    assert not student.grad[~inside].any() and bool((student.grad[inside].abs().sum(-1) > 0).all())
    assert float(lattice_divergence(teacher, teacher, targets, *lengths).detach()) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="same shape"):
        lattice_divergence(student, teacher[:, :2], targets, *lengths)
