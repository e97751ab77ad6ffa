"""Second-order damages, set right by a few measured ones: anchors per layer and kind of treatment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef
from layerwright.core.option import Scores
from layerwright.core.treatment import Treatments
from layerwright.score.base import SCORERS, Subject
from layerwright.score.options import fisher_judge, score_options
from layerwright.score.replay import Replay, thin_batch

__all__ = ["anchored_fisher", "rescale"]

SPACING = 2.0
"""Anchors of one kind predict damages at least this factor apart."""
ABOVE_FLOOR = 3.0
"""A second anchor is measured where it is expected this many times above the rounding noise."""
LEAST = 0.25
"""No damage falls below this share of its prediction: a few samples cannot prove a change harmless."""

Measure = Callable[[Treatments], float]


@SCORERS.register("anchored_fisher")
def anchored_fisher(subject: Subject, anchors: int = 2, terms: int = 1000) -> Scores:
    """`fisher` damages, scaled by measured damages of each layer's strongest treatments, kind by kind.

    The factored Fisher information takes tokens for independent and the loss for a parabola. Both fail in early
    blocks (several times too low) and for treatments that remove whole directions of a weight, which hits few tokens
    hard. So up to `anchors` treatments of every kind (bits; sparsity and bits; rank and bits) are measured in every
    layer, as the divergence of the model's predictions on the last batch, which the treatments have not seen; the
    logarithm of measured over predicted is interpolated between them. In units of the loss.

    Cost beyond `fisher`: half a forward of about `terms` loss terms per anchor, ``anchors * kinds`` at most per layer,
    and all block outputs on that batch. Source: loss measured one layer at a time as in Hubara et al. (2020), arXiv
    2006.10518; the scaling is our own.
    """
    begun = time.perf_counter()
    batches = list(subject.calibration)
    data = subject.calibration
    # Methods that look at inputs fit them: what they do to other text is worse, and differently so for each kind.
    fitting = Calibration(batches[:-1], data.loss_fn, name=data.name, unit=data.unit) if len(batches) > 1 else data
    units = _blocks(subject)
    replay = Replay(subject.model, data, thin_batch(batches[-1], terms), units)
    floors: dict[str, float] = {}
    count = 0

    def correct(
        ref: LayerRef, predicted: Mapping[Treatments, float], results: Mapping[Treatments, Tensor]
    ) -> dict[Treatments, float]:
        def measure(treatments: Treatments) -> float:
            nonlocal count
            count += 1
            return replay.damage(ref, results[treatments])

        unit = next((path for path in units if ref.path.startswith(path + ".")), ref.path)
        if unit not in floors:
            gentle = min(predicted, key=lambda t: predicted[t])
            floors[unit] = max(measure(gentle) - predicted[gentle], 0.0)
        return rescale(predicted, measure, floor=floors[unit], anchors=anchors)

    scores = score_options(replace(subject, calibration=fitting), "anchored_fisher", fisher_judge(subject), correct)
    meta = {**scores.meta, "measured": count, "measured_by": "loss" if replay.by_loss else "divergence"}
    return replace(scores, data=data.fingerprint(), seconds=time.perf_counter() - begun, meta=meta)


def rescale(
    predicted: Mapping[Treatments, float], measure: Measure, *, floor: float = 0.0, anchors: int = 2
) -> dict[Treatments, float]:
    """Damages of one layer's treatments: `predicted`, scaled to agree with `measure` at the anchors of each kind.

    Anchors are the strongest treatment of a kind and those at least `SPACING` below the anchor before. Between two
    anchors the logarithm of the factor is linear in the logarithm of the prediction; beyond them it is constant.

    Args:
        predicted: damages, at least 0, by treatment.
        measure: the measured damage of a treatment.
        floor: what measuring reads for no damage at all (rounding); taken off.
        anchors: at most so many per kind, at least 1.

    Raises:
        InputError: `anchors` below 1.
    """
    if anchors < 1:
        raise InputError(f"anchors: got {anchors}, expected at least 1 measured treatment per kind")
    found: dict[Treatments, float] = {}
    kinds: dict[tuple[str, ...], list[Treatments]] = {}
    for treatments in predicted:
        kinds.setdefault(tuple(t.tag for t in treatments), []).append(treatments)
    for members in kinds.values():
        points: list[tuple[float, float]] = []
        last, factor = math.inf, 1.0
        for treatments in sorted(members, key=lambda t: -predicted[t]):
            value = predicted[treatments]
            expected = max(value * factor, value)
            if value <= 0 or value > last / SPACING or len(points) == anchors:
                continue
            if points and expected < ABOVE_FLOOR * floor:
                break
            factor = max((measure(treatments) - floor) / value, LEAST)
            points.append((math.log(value), math.log(factor)))
            last = value
        for treatments in members:
            value = predicted[treatments]
            found[treatments] = value * math.exp(_interpolate(points, math.log(value))) if value > 0 else value
    return found


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """The piecewise linear function through `points` (x falling) at `x`, constant beyond the ends."""
    if x >= points[0][0]:
        return points[0][1]
    for (high, at_high), (low, at_low) in pairwise(points):
        if x >= low:
            return at_low + (at_high - at_low) * (x - low) / (high - low)
    return points[-1][1]


def _blocks(subject: Subject) -> list[str]:
    try:
        return [name for stack in find_blocks(subject.model) for name in stack.names]
    except InputError:
        return []
