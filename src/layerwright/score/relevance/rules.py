"""Rules that hand relevance from an operation's output back to its inputs; each keeps the sum.

Relevance has the shape of the tensor that it belongs to. A rule divides by what it distributes; where that is zero the
relevance is lost, and the sum with it. Biases take no relevance.

Sources: Bach et al. (2015); Montavon et al. (2017); for transformers Chefer, Gur and Wolf (2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwright.core.errors import InputError

__all__ = [
    "EPS",
    "lrp_add",
    "lrp_conv",
    "lrp_linear",
    "lrp_matmul",
    "lrp_multiply",
    "lrp_pixels",
    "lrp_proportional",
    "safe_divide",
]

EPS = 1e-9
"""What is added to a divisor's size."""

Linear = Callable[[Tensor, Tensor], Tensor]
"""``f(x, weight)``, linear in `x` and without a bias."""


def safe_divide(numerator: Tensor, denominator: Tensor, eps: float = EPS) -> Tensor:
    """``numerator / (denominator + eps * sign(denominator))``, and 0 where the denominator is 0."""
    zero = denominator == 0
    divided = numerator / (denominator + eps * denominator.sign()).masked_fill(zero, 1.0)
    return divided.masked_fill(zero, 0.0)


def lrp_linear(x: Tensor, weight: Tensor, relevance: Tensor, *, alpha: float = 1.0, eps: float = EPS) -> Tensor:
    """Relevance of the input of ``x @ weight.T`` by the alpha-beta rule with ``beta = alpha - 1``.

    With x and W split by sign, ``Z = x+ W+ + x- W-`` and ``R_x = x+ (S W+) + x- (S W-)`` for ``S = R / Z``: an output
    is explained by what pushes it up. For `alpha` above 1 the products that push it down count against it.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``.
        relevance: ``(..., out)``.
        alpha: 1 or more.
        eps: see `safe_divide`.

    Returns:
        ``(..., in)``.
    """
    return _alpha_beta(F.linear, x, weight, relevance, alpha, eps)


def lrp_conv(
    x: Tensor,
    weight: Tensor,
    relevance: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    alpha: float = 1.0,
    eps: float = EPS,
) -> Tensor:
    """As `lrp_linear` for a convolution of one to three dimensions.

    Args:
        x: ``(batch, channels, *size)``.
        weight: ``(out, channels / groups, *kernel)``.
        relevance: ``(batch, out, *size)``.
        stride, padding, dilation, groups: of the convolution.
        alpha, eps: see `lrp_linear`.
    """
    return _alpha_beta(_convolve(weight, stride, padding, dilation, groups), x, weight, relevance, alpha, eps)


def lrp_pixels(
    x: Tensor,
    weight: Tensor,
    relevance: Tensor,
    low: float,
    high: float,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = EPS,
) -> Tensor:
    """The z^B rule for the convolution that reads pixels between `low` and `high` (Montavon et al., 2017).

    ``Z = W x - W+ low - W- high``, so that dark and bright pixels can both be relevant. Shapes as for `lrp_conv`.
    """
    if not low < high:
        raise InputError(f"pixels: got the range {low} to {high}, expected low below high")
    convolve = _convolve(weight, stride, padding, dilation, groups)
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (x, torch.full_like(x, low), torch.full_like(x, high))]
        total = (
            convolve(inputs[0], weight)
            - convolve(inputs[1], weight.clamp(min=0))
            - convolve(inputs[2], weight.clamp(max=0))
        )
        share = safe_divide(relevance, total.detach(), eps)
        gradients = torch.autograd.grad(total, inputs, share)
    return sum((value.detach() * g for value, g in zip(inputs, gradients, strict=True)), torch.zeros_like(x))


def lrp_matmul(a: Tensor, b: Tensor, relevance: Tensor, *, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Relevance of both factors of ``a @ b``, half of it each.

    ``S = R / (a b)``, ``R_a = a (S b^T) / 2``, ``R_b = b (a^T S) / 2``.

    Args:
        a: ``(..., rows, inner)``.
        b: ``(..., inner, columns)``.
        relevance: ``(..., rows, columns)``.
    """
    share = safe_divide(relevance, a @ b, eps)
    left = a * (share @ b.transpose(-1, -2)) / 2
    right = b * (a.transpose(-1, -2) @ share) / 2
    return left.sum_to_size(a.shape), right.sum_to_size(b.shape)


def lrp_add(a: Tensor, b: Tensor, relevance: Tensor, *, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Relevance of both terms of ``a + b``, such as a branch and the path that skips it.

    Each element's relevance is shared in proportion to its terms, which may be of opposite signs and large; both
    results are then rescaled, for each sample (first dimension) on its own, so that their totals are the parts
    ``|sum R_a|`` and ``|sum R_b|`` of the total of `relevance` (Chefer et al., 2021).
    """
    share = safe_divide(relevance, a + b, eps)
    first, second = (a * share), (b * share)
    sums = [_per_sample(t) for t in (first, second)]
    size = sums[0].abs() + sums[1].abs()
    total = _per_sample(relevance)
    scaled = [
        r * safe_divide(safe_divide(s.abs(), size, eps) * total, s, eps)
        for r, s in zip((first, second), sums, strict=True)
    ]
    return scaled[0].sum_to_size(a.shape), scaled[1].sum_to_size(b.shape)


def lrp_multiply(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of both factors of the elementwise ``a * b``: half of it each."""
    return (relevance / 2).sum_to_size(a.shape), (relevance / 2).sum_to_size(b.shape)


def lrp_proportional(function: Callable[[Tensor], Tensor], x: Tensor, relevance: Tensor, *, eps: float = EPS) -> Tensor:
    """Relevance of the input of a linear `function` of it (a mean, a pool), in proportion to what each value adds."""
    with torch.enable_grad():
        value = x.detach().requires_grad_()
        output = function(value)
        (gradient,) = torch.autograd.grad(output, value, safe_divide(relevance, output.detach(), eps))
    return x * gradient


def _alpha_beta(f: Linear, x: Tensor, weight: Tensor, relevance: Tensor, alpha: float, eps: float) -> Tensor:
    if alpha < 1:
        raise InputError(f"alpha: got {alpha}, expected 1 or more (beta is alpha - 1)")
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    found = alpha * _signed_share(f, x, positive, negative, relevance, eps)
    if alpha > 1:
        found = found - (alpha - 1) * _signed_share(f, x, negative, positive, relevance, eps)
    return found


def _signed_share(f: Linear, x: Tensor, for_plus: Tensor, for_minus: Tensor, relevance: Tensor, eps: float) -> Tensor:
    with torch.enable_grad():
        plus = x.detach().clamp(min=0).requires_grad_()
        minus = x.detach().clamp(max=0).requires_grad_()
        total = f(plus, for_plus) + f(minus, for_minus)
        share = safe_divide(relevance, total.detach(), eps)
        up, down = torch.autograd.grad(total, (plus, minus), share)
    return plus.detach() * up + minus.detach() * down


def _convolve(
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Linear:
    functions = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
    if weight.dim() not in functions:
        raise InputError(f"convolution: got a weight of {weight.dim()} dimensions, expected 3 to 5")
    function = functions[weight.dim()]

    def convolve(x: Tensor, kernel: Tensor) -> Tensor:
        return function(x, kernel, None, stride, padding, dilation, groups)  # type: ignore[arg-type]

    return convolve


def _per_sample(x: Tensor) -> Tensor:
    """The sum of each sample, ``(batch, 1, ...)``."""
    return x.sum(tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else x
