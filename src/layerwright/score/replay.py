"""What one treated weight does to a model's predictions, measured: the blocks before it are not run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, evaluating, logits_of
from layerwright.core.kept_blocks import KeptBlocks
from layerwright.core.layer import LayerRef, from_matrices, get_parameter
from layerwright.core.products import fast_products
from layerwright.score.gradients import loss_terms

__all__ = ["Replay", "divergence", "model_damage", "thin_batch", "with_weight"]

CHUNK_ROWS = 256
"""Predictions that are compared at a time."""


@contextmanager
def with_weight(model: nn.Module, ref: LayerRef, matrices: Tensor) -> Iterator[None]:
    """Context: the weight of `ref` is `matrices` ``(count, out, in)``, in the dtype it had; put back at the end."""
    parameter = get_parameter(model, ref.parameter)
    owner, _, name = ref.parameter.rpartition(".")
    module = model.get_submodule(owner)
    weight = from_matrices(matrices.to(parameter.dtype), ref.layout, parameter.shape).contiguous()
    module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        module._parameters[name] = parameter  # type: ignore[assignment]


def divergence(before: Tensor, after: Tensor) -> float:
    """Mean Kullback-Leibler divergence of predictions ``softmax(after)`` from ``softmax(before)``, in nats.

    Logits ``(rows, classes)``. Where the model is calibrated this is the expected rise of its log loss, without the
    first-order noise that a small sample's labels put on a difference of losses. Computed in float32.
    """
    total = 0.0
    for old, new in zip(before.split(CHUNK_ROWS), after.split(CHUNK_ROWS), strict=True):
        logs = old.float().log_softmax(-1)
        total += float((logs.exp() * (logs - new.float().log_softmax(-1))).sum())
    return total / max(len(before), 1)


def thin_batch(batch: Any, terms: int) -> Any:
    """Evenly spaced samples of `batch` that hold at least `terms` loss terms; all of it where samples cannot be told
    apart (tensors of different lengths).
    """
    values = (
        list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    )
    lengths = {len(v) if isinstance(v, Tensor) and v.dim() else 0 for v in values}
    rows = lengths.pop() if len(lengths) == 1 else 0
    keep = -(-terms * rows // loss_terms(batch)) if rows else 0
    if not rows or keep >= rows:
        return batch
    chosen = torch.linspace(0, rows - 1, max(keep, 1)).round().long()
    if isinstance(batch, Tensor):
        return batch[chosen]
    if isinstance(batch, Mapping):
        return {key: value[chosen] for key, value in batch.items()}
    return type(batch)(value[chosen] for value in batch)


class Replay:
    """Predictions of a model on one batch, and how far a treated weight moves them.

    With a weight of a block changed, the blocks that ran before it hand on what was kept of the untouched model
    (`KeptBlocks`). Half of a forward on average. Memory: the outputs of all blocks and the
    predictions on this batch.

    Args:
        model: left as it is.
        calibration: how to feed `batch`, and the loss.
        batch: see `thin_batch`.
        units: paths of the blocks, none inside another.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, batch: Any, units: Sequence[str]) -> None:
        self.model, self.calibration = model, calibration
        self.by_loss = not _classifies(calibration, batch)
        self._blocks = KeptBlocks(model, calibration, units, [batch], self._predict)
        (self._before,) = self._blocks.keep()

    @torch.no_grad()
    def damage(self, ref: LayerRef, matrices: Tensor) -> float:
        """Divergence with the weight of `ref` replaced by `matrices` ``(count, out, in)``; without class labels the
        rise of the loss, which may be negative.
        """
        with with_weight(self.model, ref, matrices):
            (after,) = self._blocks.logits(ref.path)
        return float(after - self._before) if self.by_loss else divergence(self._before, after)

    def _predict(self, batch: Any) -> Tensor:
        return _predictions(self.model, self.calibration, batch, by_loss=self.by_loss)


def _predictions(model: nn.Module, calibration: Calibration, batch: Any, *, by_loss: bool) -> Tensor:
    """Logits ``(rows, classes)`` where a label counts, or the loss."""
    with fast_products():
        if by_loss:
            return calibration.loss(model, batch).detach().float()
        logits = logits_of(calibration.forward(model, batch))
    labels = _labels(batch)
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]:
        return logits[labels.to(logits.device) != -100]
    return logits.flatten(0, -2)


@torch.no_grad()
def model_damage(before: nn.Module, after: nn.Module, calibration: Calibration) -> float:
    """Mean divergence of the predictions of `after` from those of `before`; without class labels the rise of the loss.

    Two forwards per batch; memory: the predictions on one batch.
    """
    total, terms = 0.0, 0
    with evaluating(before), evaluating(after):
        for batch in calibration:
            by_loss, count = not _classifies(calibration, batch), loss_terms(batch)
            old, new = (_predictions(model, calibration, batch, by_loss=by_loss) for model in (before, after))
            total += count * (float(new - old) if by_loss else divergence(old, new))
            terms += count
    return total / terms


def _labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None


def _classifies(calibration: Calibration, batch: Any) -> bool:
    """Whether the loss is the cross-entropy of predicted classes, so that predictions can be compared."""
    labels = _labels(batch)
    whole = isinstance(labels, Tensor) and not labels.is_floating_point()
    return calibration.loss_fn is None and whole
