"""Give a convolution's new bias to the BatchNorm that reads it, where it takes no bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from layerwright.core.calibration import Calibration, evaluating
from layerwright.nn.quantized import QuantConv
from layerwright.treat._following import follow

__all__ = ["absorb_biases_"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def absorb_biases_(model: nn.Module, layers: Sequence[str], data: Calibration) -> list[str]:
    """Move the biases of the convolutions `layers` into the means of their BatchNorms; returns those that were moved.

    ``(x + b - mean) g = (x - (mean - b)) g``, so that the output of the model in evaluation mode is the same and a
    layer that was planned without a bias is stored without one. A layer that anything but one BatchNorm reads, or that
    runs more than once, keeps its bias.
    """
    known = dict(model.named_modules())
    watched = {p: m for p in layers if isinstance(m := known[p], QuantConv) and m.bias is not None}
    with evaluating(model):
        batch = next(iter(data))
        found = follow(model, watched, lambda: data.forward(model, batch))
    moved: list[str] = []
    for path, layer in watched.items():
        readers = {at for _, at in found[path].readers}
        norm = known.get(next(iter(readers))) if len(readers) == 1 else None
        if found[path].calls != 1 or not isinstance(norm, _NORMS) or norm.running_mean is None:
            continue
        assert layer.bias is not None
        norm.running_mean.copy_(norm.running_mean.float() - layer.bias.float())
        layer.bias = None
        moved.append(path)
    return moved
