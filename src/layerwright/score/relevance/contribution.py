"""Bits where the prediction comes from: layers scored by their relevance."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, as_calibration
from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model
from layerwright.core.option import Scores
from layerwright.core.treatment import Quantize, RoundActivations, Treatments
from layerwright.score.base import Subject
from layerwright.score.relevance.propagate import Relevance, lrp

__all__ = ["contributions", "lrp_contribution", "lrp_scorer", "quantization_noise"]

Kind = Literal["grad_positive", "share", "abs"]


def contributions(relevance: Relevance, kind: Kind = "grad_positive") -> dict[str, float]:
    """What each layer contributes, summed over the samples of one pass (see `lrp_contribution`)."""
    found = {}
    for name, values in relevance.by_layer.items():
        if kind == "grad_positive":
            found[name] = float((relevance.gradients[name] * values).clamp(min=0).sum())
        elif kind == "abs":
            found[name] = float(values.abs().sum())
        else:
            parts = values.reshape(len(relevance.total), -1).sum(1)
            found[name] = float((parts / relevance.total).abs().sum())
    return found


def lrp_contribution(
    model: nn.Module,
    data: Calibration | Iterable[Any],
    kind: Kind = "grad_positive",
    *,
    rules: str = "alpha1beta0",
    progress: Any = None,
) -> dict[str, float]:
    """Share of every layer in what the model predicts: numbers from 0, summing to 1.

    Relevance is kept from layer to layer, so that its plain sum tells nothing; what tells layers apart is one of

    - ``grad_positive``: ``sum max(0, dy/do * R_o)`` over the layer's output ``o`` for the logit ``y`` of the predicted
      class, as Chefer et al. (2021) weigh attention maps;
    - ``share``: the part of the relevance that passes the layer rather than around it;
    - ``abs``: ``sum |R_o|``.

    Args:
        model: a vision transformer; left as it is.
        data: images.
        kind: see above.
        rules: see `lrp`.
        progress: called with (done, total) batches.

    Returns:
        By path of linear layers and convolutions, and ``<attention>:scores``, ``<attention>:values``.

    Raises:
        TypeError: no attention in it, or no images in a batch.
        InputError: an unknown kind.

    Source: Ranjan and Savakis (2024), arXiv 2401.11243; the exact score is ours.
    """
    if kind not in ("grad_positive", "share", "abs"):
        raise InputError(f"kind: got {kind!r}, expected grad_positive, share or abs")
    calibration = as_calibration(data)
    sums: dict[str, float] = {}
    for number, batch in enumerate(calibration):
        found = lrp(model, _images(batch, model), rules=rules, gradients=kind == "grad_positive")
        for name, value in contributions(found, kind).items():
            sums[name] = sums.get(name, 0.0) + value
        if progress:
            progress(number + 1, len(calibration))
    whole = sum(sums.values())
    if not whole > 0:
        raise InputError("lrp: no layer has relevance on this data; use other images, or another kind")
    return {name: value / whole for name, value in sums.items()}


def quantization_noise(bits: int) -> float:
    """``4**-bits``: how the squared error of rounding falls with the width."""
    return 4.0**-bits


def lrp_scorer(
    subject: Subject,
    kind: Kind = "grad_positive",
    noise: Literal["exponential", "linear"] = "exponential",
    sensitivity: Mapping[str, Mapping[int, float]] | None = None,
    weight: float = 1.0,
) -> Scores:
    """Contribution of the layer times the noise of its bits (Ranjan and Savakis, 2024, LRP-QViT).

    ``damage = Omega * 4**-bits`` (`noise: exponential`), or ``Omega * (16 - bits)`` (`linear`); weights and activations
    of other widths than each other count half each. No unit of the loss. ``sensitivities`` hold Omega, those of the
    products of attention too.

    Args:
        kind: see `lrp_contribution`.
        noise: see above.
        sensitivity: measured drops of quality by layer and bits, added with `weight` (Mix-QViT, arXiv 2501.06357);
            they are scaled to sum to 1 at each layer's narrowest width.
    """
    begun = time.perf_counter()
    omega = lrp_contribution(subject.model, subject.calibration, kind, progress=subject.progress)
    unit = sum(max(drops.values(), default=0.0) for drops in (sensitivity or {}).values()) or 1.0
    damages: dict[tuple[str, Treatments], float] = {}
    for ref in subject.layers:
        for treatments in subject.candidates.get(ref.path, ()):
            widths = _widths(treatments, ref.path)
            costs = [quantization_noise(b) if noise == "exponential" else 16.0 - b for b in widths]
            drop = (sensitivity or {}).get(ref.path, {}).get(min(widths), 0.0)
            damages[(ref.path, treatments)] = omega.get(ref.path, 0.0) * sum(costs) / len(costs) + weight * drop / unit
    meta = {"loss_units": False, "kind": kind, "noise": noise}
    return Scores(
        "lrp",
        damages,
        omega,
        fingerprint_model(subject.model),
        subject.calibration.fingerprint(),
        None,
        time.perf_counter() - begun,
        meta,
    )


def _widths(treatments: Treatments, path: str) -> list[int]:
    found = [t.bits for t in treatments if isinstance(t, Quantize | RoundActivations)]
    if not found or len(found) != len(treatments):
        raise InputError(f"lrp: {path}: it judges widths only; give candidates of quantize and activations")
    return found


def _images(batch: Any, model: nn.Module) -> Tensor:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    first = batch.get("pixel_values") if isinstance(batch, Mapping) else None
    images = first if first is not None else next((t for t in values if isinstance(t, Tensor)), None)
    if not isinstance(images, Tensor) or not torch.is_floating_point(images) or images.dim() < 3:
        raise TypeError(
            f"{type(model).__name__}: relevance needs images (batch, channels, height, width) in each batch"
        )
    return images
