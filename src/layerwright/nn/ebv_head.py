"""A classifier of fixed unit vectors, nearly orthogonal to one another, in place of learnt rows (Shen et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.equiangular_cache import cached_ebv

__all__ = ["EBVHead", "ebv_logits", "ebv_loss"]

_EPS = 1e-6
"""Least length that features are divided by."""


def ebv_logits(features: Tensor, vectors: Tensor, temperature: float = 0.07) -> Tensor:
    """``cos(features, w_k) / temperature`` for unit rows ``w_k``: ``(..., dim)`` and ``(classes, dim)`` to ``(..., classes)``.

    In float32, under autocast too. Features of length zero give zeros.

    Raises:
        TypeError: whole numbers.
    """
    if not features.is_floating_point():
        raise TypeError(f"features: got {features.dtype}, expected floating-point numbers")
    device = features.device.type
    with torch.autocast("cpu" if device == "meta" else device, enabled=False):
        wide = torch.promote_types(features.dtype, torch.float32)
        unit = functional.normalize(features.to(wide), dim=-1, eps=_EPS)
        return unit @ vectors.to(wide).T / temperature


def ebv_loss(
    features: Tensor, target: Tensor, vectors: Tensor, temperature: float = 0.07, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy of `ebv_logits`: draws features towards their class's vector and from all others'.

    Source: Shen et al., "Equiangular Basis Vectors" (2023, arXiv 2303.11637); its code smooths labels by 0.1.

    Args:
        features: ``(batch, dim)``, of any length but zero.
        target: ``(batch,)`` in ``0..classes - 1``.
        vectors: ``(classes, dim)``, unit rows of the classes in use.
        temperature: above 0.
        label_smoothing: in [0, 1).

    Raises:
        TypeError: features that are whole numbers.
        InputError: a target outside the classes, or a temperature that is not positive.
    """
    _check_temperature(temperature)
    if target.numel() and (int(target.min()) < 0 or int(target.max()) >= len(vectors)):
        raise InputError(
            f"target: got classes {int(target.min())} to {int(target.max())}, expected 0 to {len(vectors) - 1}"
        )
    logits = ebv_logits(features, vectors, temperature)
    return functional.cross_entropy(logits, target, label_smoothing=label_smoothing)


class EBVHead(nn.Module):
    """``logits_k = cos(W x + b, w_k) / temperature`` with fixed unit vectors ``w_k``; the linear map `fc` alone learns.

    Which class has which vector does not matter. `vectors` is a buffer of ``num_classes + reserve`` rows or more, in
    float32 whatever the head is converted to; rows in reserve wait for classes to come (`add_classes`). Costs
    ``in_features dim + num_classes dim`` multiply-adds, and ``(in_features + 1) dim`` parameters, however many classes.

    Source: Shen et al., "Equiangular Basis Vectors" (2023, arXiv 2303.11637).

    Args:
        in_features: of the inputs.
        num_classes: of the logits.
        dim: of the vectors; one for each vector if left out, which makes them orthonormal.
        vectors: ``(n, dim)``, unit rows; if left out `cached_ebv` gives them, which takes a while for many vectors of
            few dimensions the first time.
        temperature: what cosines are divided by.
        reserve: vectors beyond those of `num_classes`.
        bias: whether `fc` has one.
        seed: of the vectors.

    Raises:
        InputError: a number outside its range, or vectors that are too few, no matrix, or not of length 1.
    """

    vectors: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        dim: int | None = None,
        vectors: Tensor | None = None,
        temperature: float = 0.07,
        reserve: int = 0,
        *,
        bias: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 1 or reserve < 0:
            raise InputError(
                f"in_features, num_classes, reserve: got {in_features}, {num_classes} and {reserve}, expected at least 1, 1, 0"
            )
        if dim is not None and dim < 1:
            raise InputError(f"dim: got {dim}, expected at least 1")
        _check_temperature(temperature)
        needed = num_classes + reserve
        if vectors is None:
            dim = dim or needed
            if (default := torch.empty(0).device).type == "meta":
                vectors = torch.empty(needed, dim, device="meta")
            else:
                vectors = cached_ebv(needed, dim, seed).vectors.to(default)
        else:
            _check_vectors(vectors, needed, dim)
        self.in_features, self.num_classes, self.temperature = in_features, num_classes, temperature
        self.dim = int(vectors.shape[1])
        self.fc = nn.Linear(in_features, self.dim, bias=bias)
        self.register_buffer("vectors", vectors.detach().to(torch.float32, copy=True))

    @property
    def reserve(self) -> int:
        """Vectors that no class has yet."""
        return len(self.vectors) - self.num_classes

    def embed(self, x: Tensor) -> Tensor:
        """Features of length 1 ``(..., dim)`` of ``(..., in_features)``, for retrieval by cosine."""
        self._check(x)
        features: Tensor = self.fc(x)
        return functional.normalize(features.float(), dim=-1, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(..., num_classes)`` in float32 of ``(..., in_features)``.

        Raises:
            TypeError: whole numbers.
            InputError: another number of features.
        """
        self._check(x)
        return ebv_logits(self.fc(x), self.vectors[: self.num_classes], self.temperature)

    def add_classes(self, count: int) -> Self:
        """Give `count` new classes the next vectors of the reserve; no vector and no weight changes.

        Raises:
            InputError: fewer vectors are in reserve, or `count` is negative.
        """
        if not 0 <= count <= self.reserve:
            raise InputError(
                f"count: got {count} new classes, but {self.reserve} vectors are in reserve; make the head with a larger reserve"
            )
        self.num_classes += count
        return self

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, dim={self.dim}, reserve={self.reserve}, "
            f"temperature={self.temperature}"
        )

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x: got {x.dtype}, expected floating-point numbers")
        if x.shape[-1] != self.in_features:
            raise InputError(f"x: got {x.shape[-1]} features, expected {self.in_features}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Cosines of nearly orthogonal vectors would not survive the rounding of bfloat16.
        exact = self.vectors
        super()._apply(fn, recurse)
        if self.vectors.dtype != torch.float32:
            self.vectors = exact.to(self.vectors.device)
        return self


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature: got {temperature}, expected a positive number")


def _check_vectors(vectors: Tensor, needed: int, dim: int | None) -> None:
    if vectors.dim() != 2 or (dim is not None and vectors.shape[1] != dim):
        raise InputError(f"vectors: got shape {tuple(vectors.shape)}, expected (n, {dim or 'dim'})")
    if not vectors.is_floating_point():
        raise TypeError(f"vectors: got {vectors.dtype}, expected floating-point numbers")
    if len(vectors) < needed:
        raise InputError(
            f"vectors: got {len(vectors)}, expected at least {needed} for num_classes and reserve together"
        )
    if vectors.device.type != "meta" and not bool(((vectors.float().norm(dim=1) - 1).abs() < 1e-3).all()):
        raise InputError("vectors: expected rows of length 1 to within 0.001; normalise them first")
