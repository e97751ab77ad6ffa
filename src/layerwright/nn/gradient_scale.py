"""A gradient that is kept or reversed sample by sample, and the classifier that works for the target alone (TDASS)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.scaled_gradient import scale_gradient

__all__ = ["ConditionalGradientReversal", "SelfInterestedClassifier", "check_is_target", "gradient_scale"]


def gradient_scale(x: Tensor, coef: Tensor | float) -> Tensor:
    """`x` itself; the gradient that goes back through it is multiplied by `coef`, sample by sample.

    A number is handed to `scale_gradient`. Source of the reversal (a negative number): Ganin et al., 2016, arXiv 1505.07818.

    Args:
        x: ``(batch, ...)``.
        coef: a number, or ``(batch,)``: one for each sample. It gets no gradient of its own.

    Raises:
        InputError: `coef` is not a number for each sample, or a single one that is not finite.
    """
    if not isinstance(coef, Tensor):
        return scale_gradient(x, coef)
    if coef.dim() != 1 or x.dim() < 1 or len(coef) != len(x):
        raise InputError(f"coef: got shape {tuple(coef.shape)} for x of shape {tuple(x.shape)}, expected one a sample")
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    scaled: Tensor = _ScaledBySample.apply(x, coef.detach().to(x).view(-1, *(1,) * (x.dim() - 1)))  # type: ignore[no-untyped-call]
    return scaled


class _ScaledBySample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coef: Tensor) -> Tensor:
        ctx.save_for_backward(coef)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (coef,) = ctx.saved_tensors
        return coef * gradients[0], None


def check_is_target(is_target: Tensor, batch: int) -> None:
    """Nothing, if `is_target` says of each of `batch` samples whether it is the target's.

    Raises:
        InputError: not bool, or of another length.
    """
    if is_target.dtype != torch.bool or tuple(is_target.shape) != (batch,):
        raise InputError(
            f"is_target: got {is_target.dtype} of shape {tuple(is_target.shape)}, expected torch.bool of shape ({batch},)"
        )


class ConditionalGradientReversal(nn.Module):
    """The identity; backward, gradients of target samples are kept and those of all others reversed.

    ``gradient * strength * target`` for target samples, ``gradient * strength * non_target`` for others. Whatever stands
    behind gets its true gradient. Source: Zhang et al., 2022, TDASS, arXiv 2205.11824, which does not state the
    operation on target samples: ``target=0`` (none reach the features) is the other plausible reading.

    Args:
        target, non_target: finite factors; both -1 make the usual gradient reversal.

    Raises:
        InputError: a factor that is not finite.
    """

    def __init__(self, target: float = 1.0, non_target: float = -1.0) -> None:
        super().__init__()
        for name, factor in (("target", target), ("non_target", non_target)):
            if not math.isfinite(factor):
                raise InputError(f"{name}: got {factor}, expected a finite number")
        self.target, self.non_target = float(target), float(non_target)

    def forward(self, x: Tensor, is_target: Tensor, strength: float = 1.0) -> Tensor:
        """`x` ``(batch, ...)``; `is_target` ``(batch,)`` bool; `strength` is lambda, from 0.

        Raises:
            InputError: `is_target` is not bool or has another length, or `strength` is not finite.
        """
        check_is_target(is_target, len(x))
        if not math.isfinite(strength):
            raise InputError(f"strength: got {strength}, expected a finite number")
        kept = is_target.to(x.device)
        factors = torch.where(kept, self.target * strength, self.non_target * strength)
        return gradient_scale(x, factors)

    def extra_repr(self) -> str:
        """The two factors."""
        return f"target={self.target}, non_target={self.non_target}"


class SelfInterestedClassifier(nn.Module):
    """Is this feature the target's? Two linear layers behind a `ConditionalGradientReversal`.

    Its own weights learn to tell; the features in front are changed so that target samples stay recognisable and all
    others are taken for the target. Source: Zhang et al., 2022, TDASS, arXiv 2205.11824.

    Args:
        dim: of the feature.
        hidden: width between the layers.
        classes: 2 (other, target); more for a classifier of speakers in usual domain-adversarial training.
        target, non_target: see `ConditionalGradientReversal`.
        generator: of the first weights; seed 0 if left out.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 256,
        *,
        classes: int = 2,
        target: float = 1.0,
        non_target: float = -1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value, low in (("dim", dim, 1), ("hidden", hidden, 1), ("classes", classes, 2)):
            if value < low:
                raise InputError(f"{name}: got {value}, expected at least {low}")
        generator = generator or torch.Generator().manual_seed(0)
        self.reversal = ConditionalGradientReversal(target, non_target)
        with torch.random.fork_rng(devices=[]):  # drawn again below, from `generator`
            self.inner, self.outer = nn.Linear(dim, hidden), nn.Linear(hidden, classes)
        for layer in (self.inner, self.outer):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, h: Tensor, is_target: Tensor, strength: float = 1.0) -> Tensor:
        """Logits ``(batch, classes)`` of features ``(batch, dim)``; class 1 of two is the target.

        Raises:
            InputError: `h` has another shape, or see `ConditionalGradientReversal`.
        """
        if h.dim() != 2 or h.shape[1] != self.inner.in_features:
            raise InputError(f"h: got shape {tuple(h.shape)}, expected (batch, {self.inner.in_features})")
        logits: Tensor = self.outer(torch.relu(self.inner(self.reversal(h, is_target, strength))))
        return logits
