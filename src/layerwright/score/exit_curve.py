"""Accuracy against blocks and time, as the threshold of the exits moves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from layerwright.core.calibration import Calibration, as_calibration, evaluating
from layerwright.core.errors import InputError
from layerwright.nn.encoder_exits import MultiExit
from layerwright.nn.exit_head import prediction_entropy

__all__ = ["CurvePoint", "ExitRecords", "exit_curve", "exit_records"]


@dataclass(frozen=True)
class CurvePoint:
    """One threshold.

    Attributes:
        threshold: in nats.
        blocks: mean number of blocks that ran.
        accuracy: share of right labels.
        ms: milliseconds per sample, measured: median over rounds; None where it was not.
        speed_up: median over rounds of the time without early exits over this one's; None where it was not measured.
    """

    threshold: float
    blocks: float
    accuracy: float
    ms: float | None = None
    speed_up: float | None = None

    def to_data(self) -> dict[str, Any]:
        """A row of a table."""
        return asdict(self)


@dataclass(frozen=True)
class ExitRecords:
    """What every exit says about every sample: from this, any threshold is evaluated without running the model again.

    Attributes:
        positions: number of blocks of each exit.
        entropies: ``(samples, exits)``, nats.
        predictions: ``(samples, exits)``.
        labels: ``(samples,)``.
    """

    positions: tuple[int, ...]
    entropies: Tensor
    predictions: Tensor
    labels: Tensor

    def exit_places(self, threshold: float) -> Tensor:
        """Place ``(samples,)`` of the exit that each sample leaves by."""
        sure = self.entropies < threshold
        sure[:, -1] = True
        return sure.int().argmax(1)

    def blocks(self, threshold: float) -> Tensor:
        """Number of blocks ``(samples,)`` that run for each sample."""
        return torch.tensor(self.positions)[self.exit_places(threshold)]

    def point(self, threshold: float) -> CurvePoint:
        """Mean blocks and accuracy at a threshold."""
        places = self.exit_places(threshold)
        right = self.predictions.gather(1, places[:, None])[:, 0] == self.labels
        return CurvePoint(threshold, float(self.blocks(threshold).double().mean()), float(right.double().mean()))

    def accuracies(self) -> list[float]:
        """Accuracy of each exit, if all samples left there."""
        return (self.predictions == self.labels[:, None]).double().mean(0).tolist()

    def threshold_for(self, blocks: float) -> float:
        """The smallest threshold at which at most `blocks` blocks run on average.

        Raises:
            InputError: fewer blocks than the first exit has.
        """
        if blocks < self.positions[0]:
            raise InputError(f"blocks: got {blocks}, the first exit has {self.positions[0]}")
        values = self.entropies[:, :-1].flatten().unique()
        above = torch.nextafter(values, torch.full_like(values, float("inf"))).tolist()
        candidates = [0.0, *above]
        low, high = 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            if self.point(candidates[middle]).blocks <= blocks:
                high = middle
            else:
                low = middle + 1
        return float(candidates[low])

    def threshold_within(self, loss: float) -> float:
        """The threshold of fewest blocks at which accuracy is at most `loss` below that of the last exit.

        Raises:
            InputError: `loss` is negative.
        """
        if not loss >= 0:
            raise InputError(f"loss: got {loss}, expected a share of the samples, 0 or more")
        lowest = self.point(0.0).accuracy - loss
        steps = (self.positions[-1] - self.positions[0]) * 20
        grid = [self.positions[-1] - step / 20 for step in range(steps + 1)]
        points = [self.point(self.threshold_for(blocks)) for blocks in grid]
        good = [point for point in points if point.accuracy >= lowest]
        return min(good, key=lambda point: point.blocks).threshold


@torch.no_grad()
def exit_records(model: MultiExit, calibration: Calibration | Any) -> ExitRecords:
    """Run every exit on all batches; the model is left in its mode.

    Raises:
        InputError: batches without labels, or logits that an entropy cannot judge.
    """
    model.check_threshold(0.0)
    entropies, predictions, answers = [], [], []
    with evaluating(model):
        for batch in as_calibration(calibration):
            inputs, labels = model.inputs_of(batch)
            if labels is None:
                raise InputError("labels: accuracy needs batches with labels")
            logits = torch.stack(model(**inputs).exit_logits, 1)
            entropies.append(prediction_entropy(logits).cpu())
            predictions.append(logits.argmax(-1).cpu())
            answers.append(labels.cpu())
    return ExitRecords(model.positions, torch.cat(entropies), torch.cat(predictions), torch.cat(answers))


def exit_curve(
    model: MultiExit,
    calibration: Calibration | Any,
    thresholds: Sequence[float] | None = None,
    *,
    rounds: int = 0,
) -> list[CurvePoint]:
    """Mean blocks, accuracy and measured time at each threshold, most blocks first; rows for a table: ``to_data()``.

    Args:
        model: exits that learned.
        calibration: held-out batches with labels; times hold for their batch size.
        thresholds: in nats, 0 or more; None takes seven from all blocks to the first exit.
        rounds: timed runs of each threshold, in turns, so that a busy machine slows all; 0 measures no time.

    Raises:
        InputError: no threshold, a negative one, batches without labels.
    """
    records = exit_records(model, calibration)
    if thresholds is None:
        low, high = model.positions[0], model.depth
        wanted = [high - (high - low) * step / 6 for step in range(1, 6)]
        thresholds = [0.0, *(records.threshold_for(blocks) for blocks in wanted), float("inf")]
    chosen = sorted({model.check_threshold(value) for value in thresholds})
    if not chosen:
        raise InputError("thresholds: got none, expected one or more")
    points = [records.point(threshold) for threshold in chosen]
    if rounds < 1:
        return points
    times = _times(model, calibration, [0.0, *chosen], rounds)
    samples = len(records.labels)
    return [
        CurvePoint(
            point.threshold,
            point.blocks,
            point.accuracy,
            1000 * statistics.median(own) / samples,
            statistics.median(whole / part for whole, part in zip(times[0], own, strict=True)),
        )
        for point, own in zip(points, times[1:], strict=True)
    ]


def _times(model: MultiExit, calibration: Any, thresholds: Sequence[float], rounds: int) -> list[list[float]]:
    """Seconds of each round, by threshold; one more round warms up."""
    times: list[list[float]] = [[] for _ in thresholds]
    batches = list(as_calibration(calibration))
    with evaluating(model):
        for number in range(rounds + 1):
            for own, threshold in zip(times, thresholds, strict=True):
                begun = time.perf_counter()
                for batch in batches:
                    labels = model.predict(batch, threshold).labels
                labels.cpu()
                if number:
                    own.append(time.perf_counter() - begun)
    return times
