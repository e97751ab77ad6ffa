"""How large a batch is of use: the critical batch size, from runs or from gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, as_calibration
from layerwright.core.errors import InputError
from layerwright.theory.scaling._solver import finite_rows, solve

__all__ = ["BatchLaw", "critical_batch", "minimum_steps", "noise_scale"]

Array = NDArray[numpy.float64]


@dataclass(frozen=True)
class BatchLaw:
    """``B_crit(L) = scale * L**(-1 / alpha)``, in tokens (Kaplan et al., 2020, equation 1.4).

    Attributes:
        scale: ``B*``.
        alpha: ``alpha_B``; infinite for a batch size that does not depend on the loss.
        measured: ``(loss, B_crit, S_min)`` of each target loss that it was fitted to.
    """

    scale: float
    alpha: float
    measured: tuple[tuple[float, float, float], ...] = ()

    def __call__(self, loss: float) -> float:
        """The critical batch size at a loss, in tokens."""
        return float(self.scale * loss ** (-1 / self.alpha))


def minimum_steps(steps: float, batch: float, critical: float) -> float:
    """``S / (1 + B_crit / B)``: the steps that an unlimited batch would have needed (McCandlish et al., 2018)."""
    return steps / (1 + critical / batch)


def critical_batch(records: Iterable[Mapping[str, float]]) -> BatchLaw:
    """`BatchLaw` from runs of several batch sizes to the same losses: ``(S / S_min - 1) (E / E_min - 1) = 1``.

    Args:
        records: mappings with ``loss`` (the target that was reached), ``batch_tokens`` and ``steps`` (to reach it); at
            least four batch sizes for each target. With one target the size does not depend on the loss.

    Raises:
        InputError: fewer than four batch sizes at a target, or a number that is not positive.
    """
    by_loss: dict[float, list[tuple[float, float]]] = {}
    for record in records:
        values = [float(record[name]) for name in ("loss", "batch_tokens", "steps")]
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise InputError(f"records: got {dict(record)}, expected positive numbers")
        by_loss.setdefault(values[0], []).append((values[1], values[2]))
    if not by_loss:
        raise InputError("records: got none, expected loss, batch_tokens and steps of several runs")
    measured = []
    for loss, pairs in sorted(by_loss.items()):
        sizes = {batch for batch, _ in pairs}
        if len(sizes) < 4:
            raise InputError(f"records: {len(sizes)} batch sizes reach the loss {loss:g}, expected at least 4")
        measured.append((loss, *_hyperbola(numpy.array(pairs))))
    logs = numpy.log([[loss, critical] for loss, critical, _ in measured])
    if len(measured) == 1:
        return BatchLaw(measured[0][1], math.inf, tuple(measured))
    slope, intercept = numpy.polyfit(logs[:, 0], logs[:, 1], 1)
    return BatchLaw(float(math.exp(intercept)), float(-1 / slope) if slope else math.inf, tuple(measured))


def _hyperbola(pairs: Array) -> tuple[float, float]:
    """``B_crit`` and ``S_min`` of ``S = S_min (1 + B_crit / B)``, least squares on logs."""
    batch, observed = numpy.log(pairs[:, 0]), numpy.log(pairs[:, 1])

    def model(theta: Array) -> tuple[Array, Array]:
        steps, critical = theta[:, :1], theta[:, 1:]
        value = steps + numpy.logaddexp(0, critical - batch)
        share = 1 / (1 + numpy.exp(batch - critical))
        return value, numpy.stack([numpy.ones_like(share), share], -1)

    centers = numpy.linspace(batch.min() - 2, batch.max() + 2, 16)
    starts = numpy.stack([numpy.full(16, observed.min()), centers], 1)
    found, costs = solve(
        model,
        observed,
        starts,
        numpy.ones((16, len(observed))),
        delta=1e9,
        valid=finite_rows,
        steps=200,
    )
    steps, critical = numpy.exp(found[int(numpy.argmin(costs))])
    return float(critical), float(steps)


def noise_scale(
    model: nn.Module, data: Calibration | Iterable[Any], *, small: int = 1, large: int | None = None, decay: float = 0.9
) -> float:
    """The simple noise scale ``tr(S) / |G|^2`` in batches of `data`: the batch size where noise and signal are equal
    (McCandlish et al., 2018, arXiv 1812.06162). Times the tokens of a batch, an estimate of `critical_batch`.

    With ``g_b`` the mean gradient of `b` batches: ``|G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b)`` and ``tr(S) = (|g_b|^2 -
    |g_B|^2) / (1/b - 1/B)``, each averaged over groups of `large` batches before the division. The model is left as it is.

    Args:
        model: with a loss, or `data` a `Calibration` with one.
        data: several times `large` batches of one size.
        small, large: batches whose gradients are compared; by default 1 and 8 (or all, if there are fewer).
        decay: of the running averages.

    Raises:
        InputError: not ``1 <= small < large <= batches``, or a signal that is lost in the noise.
    """
    found = as_calibration(data)
    batches = list(found)
    large = min(8, len(batches)) if large is None else large
    if not 1 <= small < large <= len(batches) or large % small:
        raise InputError(
            f"small, large: got {small} and {large} for {len(batches)} batches; small must divide large, which is at most that"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(batch: Any) -> list[Tensor]:
        grads = torch.autograd.grad(found.loss(model, batch), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(grads, parameters, strict=True)]

    signal = spread = weight = 0.0
    for start in range(0, len(batches) - large + 1, large):
        group = [gradient(batch) for batch in batches[start : start + large]]
        parts = [_mean(group[i : i + small]) for i in range(0, large, small)]
        small_norm = sum(map(_norm, parts)) / len(parts)
        large_norm = _norm(_mean(group))
        signal = decay * signal + (1 - decay) * (large * large_norm - small * small_norm) / (large - small)
        spread = decay * spread + (1 - decay) * (small_norm - large_norm) / (1 / small - 1 / large)
        weight = decay * weight + 1 - decay
    if signal <= 0:
        raise InputError("noise scale: the gradient is lost in its noise; give more batches, or a larger `large`")
    return float(spread / signal)


def _mean(gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(list(tensors)).float().mean(0) for tensors in zip(*gradients, strict=True)]


def _norm(gradient: Sequence[Tensor]) -> float:
    return float(sum(tensor.float().square().sum() for tensor in gradient))
