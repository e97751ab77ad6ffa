"""Mean and variance of what every layer gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.capture import first_tensor, watch_outputs
from layerwright.core.errors import InputError

__all__ = ["variance_profile"]


def variance_profile(model: nn.Module, data: Any) -> dict[str, tuple[float, float]]:
    """``(mean, variance)`` of the output of every layer that multiplies with a weight, in the order in which they run.

    Over samples, positions and channels of all batches, in float64; a layer that runs several times counts each time.
    Variances that grow or shrink from layer to layer are those of a network that is hard to train (Mishkin and Matas,
    2016, arXiv 1511.06422); see `layerwright.train.lsuv_`.

    Args:
        model: any module of linear layers and convolutions.
        data: batches, or a `Calibration`.

    Raises:
        InputError: no such layer, or no batches.
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    paths = [name for name, module in model.named_modules() if isinstance(module, kinds) or _conv1d(module)]
    if not paths:
        raise InputError("model: no linear layer or convolution in it")
    sums: dict[str, list[float]] = {}

    def see(path: str, _inputs: Any, output: Any) -> None:
        values = first_tensor(output).detach().double()
        total = sums.setdefault(path, [0.0, 0.0, 0.0])
        total[0] += values.numel()
        total[1] += float(values.sum())
        total[2] += float(values.square().sum())

    batches = as_calibration(data)
    with torch.no_grad(), evaluating(model), watch_outputs(model, paths, see):
        for batch in batches:
            batches.forward(model, batch)
    if not sums:
        raise InputError("data: no layer ran; got no batches")
    return {
        path: (total / count, max(0.0, squares / count - (total / count) ** 2))
        for path, (count, total, squares) in sums.items()
    }


def _conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), torch.Tensor)
