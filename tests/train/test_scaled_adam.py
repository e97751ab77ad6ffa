"""ScaledAdam: steps by hand, invariance to the size of parameters, what it refuses and what it leaves out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.train import ScaledAdam


def run(start: Tensor, gradients: list[Tensor], **options: Any) -> list[Tensor]:
    """The values after each step with these gradients."""
    p = nn.Parameter(start.clone())
    optimizer = ScaledAdam([p], **options)
    values = []
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        values.append(p.detach().clone())
    return values


def reference(start: list[float], gradients: list[list[float]], lr: float, period: int = 4) -> list[list[float]]:
    """The same in plain numbers, from the equations."""
    b1, b2, eps, size = 0.9, 0.98, 1e-8, len(start)
    p, v, delta, w = list(start), [0.0] * size, [0.0] * size, 0.0
    r = math.sqrt(sum(x * x for x in p) / size)
    along: list[float] = []
    out = []
    for k, g in enumerate(gradients, 1):
        delta = [b1 * d for d in delta]
        along.append(sum(x * y for x, y in zip(p, g, strict=True)))
        if len(along) == period:
            r = math.sqrt(sum(x * x for x in p) / size)
            decay = b2**period
            w = decay * w + (1 - decay) * sum(a * a for a in along) / period
            step = -0.1 * lr * math.sqrt(1 - decay ** (k // period)) * sum(along) / (math.sqrt(w) + eps)
            step = 0.0 if r < 1e-5 else -0.1 * lr * period if r > 3 else step
            delta = [d + (1 - b1) * step * x for d, x in zip(delta, p, strict=True)]
            along = []
        v = [b2 * a + (1 - b2) * y * y for a, y in zip(v, g, strict=True)]
        scaled = [y / (math.sqrt(a / (1 - b2**k)) + eps) for a, y in zip(v, g, strict=True)]
        delta = [d - (1 - b1) * lr * max(r, 1e-5) * s for d, s in zip(delta, scaled, strict=True)]
        p = [x + d for x, d in zip(p, delta, strict=True)]
        out.append(p)
    return out


def test_one_step_by_hand() -> None:
    # rms of (3, 4) is sqrt(12.5); the first direction of Adam is the sign of the gradient.
    (found,) = run(torch.tensor([3.0, 4.0]), [torch.tensor([2.0, -0.5])], lr=0.1)
    step = 0.1 * 0.1 * math.sqrt(12.5)
    assert found.tolist() == pytest.approx([3 - step, 4 + step], rel=1e-6)


@pytest.mark.parametrize("scale", [1e-7, 0.5, 10.0])
def test_many_steps_follow_the_equations(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = scale * torch.randn(3, generator=generator)
    gradients = [torch.randn(3, generator=generator) for _ in range(13)]
    found = run(start, gradients, lr=0.05)
    expected = reference(start.tolist(), [g.tolist() for g in gradients], 0.05)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tolist() == pytest.approx(theirs, rel=1e-4, abs=1e-10)


def test_updates_are_in_proportion_to_the_parameter() -> None:
    generator = torch.Generator().manual_seed(0)
    start = 0.2 * torch.randn(4, 3, generator=generator)
    gradients = [torch.randn(4, 3, generator=generator) for _ in range(12)]
    plain = run(start, gradients)
    # f(p / 10) has a tenth of the gradient at ten times the parameter.
    larger = run(10 * start, [g / 10 for g in gradients])
    for a, b in zip(plain, larger, strict=True):
        assert torch.allclose(10 * a, b, rtol=1e-4)
    assert not torch.allclose(plain[-1], start, rtol=0.05)
    # And the size of the loss does not matter.
    for a, b in zip(plain, run(start, [1000 * g for g in gradients]), strict=True):
        assert torch.allclose(a, b, rtol=1e-4)


def test_single_numbers() -> None:
    (found,) = run(torch.tensor(1.5), [torch.tensor(0.3)], lr=0.1)
    assert float(found) == pytest.approx(1.5 - 0.1 * 0.1 * 0.1, rel=1e-6)  # no size: (1 - beta1) * 0.1 * lr
    (found,) = run(torch.tensor([5.0]), [torch.tensor([1e-3])], lr=0.1)
    assert float(found) == pytest.approx(2 - 1e-3, rel=1e-6)  # within 2 before the step


def test_nothing_without_a_gradient() -> None:
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(value, start) for value in run(start, [torch.zeros(3, 2)] * 9))
    used, unused = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = ScaledAdam([used, unused])
    used.grad = torch.ones(3, 2)
    optimizer.step()
    assert not torch.equal(used, start) and torch.equal(unused, start) and not optimizer.state[unused]


def test_large_parameters_shrink_and_tiny_ones_keep_their_size() -> None:
    still = [torch.zeros(2)] * 8
    large = run(torch.tensor([4.0, 4.0]), still, lr=0.1)
    assert large[2].tolist() == [4.0, 4.0]
    assert large[3].tolist() == pytest.approx([4 - 0.1 * 4 * 0.1 * 0.1 * 4] * 2)  # (1 - beta1) * 0.1 * lr * 4
    assert large[7][0] < large[3][0]
    ((tiny,), *_) = [run(torch.tensor([1e-9, 1e-9]), [torch.tensor([1.0, 0.0])], lr=0.1)]
    assert float(tiny[0]) == pytest.approx(1e-9 - 0.1 * 0.1 * 1e-5, rel=1e-5)  # sizes count as 1e-5 at least


def test_clipping_by_the_median() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator)
    usual = [torch.randn(5, generator=generator) for _ in range(30)]
    burst = [*usual, 1000 * usual[0]]
    same = run(start, usual, clipping_scale=100.0)
    assert all(torch.equal(a, b) for a, b in zip(same, run(start, usual), strict=True))
    p = nn.Parameter(start.clone())
    optimizer = ScaledAdam([p], clipping_scale=2.0)
    for gradient in burst:
        p.grad = gradient.clone()
        optimizer.step()
    history = optimizer.param_groups[0]["norms"]
    assert len(history) == 31 and history[-1] > 100 * sorted(history)[15]
    squares = {}
    for name, scale in (("clipped", 2.0), ("not", None)):
        p = nn.Parameter(start.clone())
        optimizer = ScaledAdam([p], clipping_scale=scale)
        for gradient in burst:
            p.grad = gradient.clone()
            optimizer.step()
        squares[name] = float(optimizer.state[p]["squares"].sum())
    assert squares["clipped"] < 1e-3 * squares["not"]


def test_half_precision_and_going_on_from_a_state() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, generator=generator).bfloat16()
    gradients = [torch.randn(4, generator=generator).bfloat16() for _ in range(6)]
    half, full = run(start, gradients), run(start.float(), [g.float() for g in gradients])
    assert half[-1].dtype == torch.bfloat16
    assert torch.allclose(half[-1].float(), full[-1], atol=0.05)
    whole = nn.Parameter(start.float())
    first = ScaledAdam([whole])
    parts = nn.Parameter(start.float())
    second: ScaledAdam = ScaledAdam([parts])
    for number, gradient in enumerate(gradients):
        whole.grad, parts.grad = gradient.float(), gradient.float()
        first.step()
        second.step()
        if number == 2:
            state = second.state_dict()
            second = ScaledAdam([parts])
            second.load_state_dict(state)
    assert torch.equal(whole, parts)
    p = nn.Parameter(start.clone())
    p.grad = gradients[0].clone()
    before = ScaledAdam([p])
    before.step()
    after = ScaledAdam([p])
    after.load_state_dict(before.state_dict())
    assert after.state[p]["squares"].dtype == torch.float32
    after.step()


def test_it_learns_at_one_rate_whatever_the_size() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    losses = []
    for scale in (1e-3, 1.0, 1e3):
        weight = nn.Parameter(0.3 * scale * torch.randn(5, generator=torch.Generator().manual_seed(1)))
        optimizer = ScaledAdam([weight], lr=0.05, max_rms=1e5)
        for _ in range(200):
            loss = ((x @ weight) / scale - x @ torch.tensor([1.0, -1, 0.5, 2, 0])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses) < 0.3
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and losses[2] == pytest.approx(losses[1], rel=1e-2)


def test_closure_and_bad_input() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = ScaledAdam([p])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 2
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        ScaledAdam(embedding.parameters()).step()
    for options in (
        {"lr": 0.0},
        {"lr": float("nan")},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"clipping_scale": 0.0},
        {"eps": 0.0},
        {"min_rms": 4.0},
        {"size_period": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            ScaledAdam([p], **options)  # type: ignore[arg-type]
