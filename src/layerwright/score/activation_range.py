"""How large the activations are that each linear layer reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.capture import watch_inputs
from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef

__all__ = ["activation_range"]


def activation_range(model: nn.Module, calibration: Calibration, refs: Sequence[LayerRef]) -> dict[str, Tensor]:
    """The largest size of each input channel over all tokens, ``(in,)`` float32 by path (Li et al., 2023, FPTQ).

    One forward pass of the model as it is; memory: one number for each channel of each layer. Layers that the data
    never reaches are left out.

    Raises:
        InputError: a layer that is not linear, or activations that are not finite; names the layer.
    """
    for ref in refs:
        if ref.layout not in ("linear", "conv1d"):
            raise InputError(f"{ref.path}: ranges are measured at linear layers, this is {ref.kind} ({ref.layout})")
    found: dict[str, Tensor] = {}

    def see(ref: LayerRef, x: Tensor, _expert: int | None) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        if len(rows):
            largest = rows.abs().amax(0).float()
            found[ref.path] = torch.maximum(found[ref.path], largest) if ref.path in found else largest

    with torch.no_grad(), evaluating(model), watch_inputs(model, refs, see):
        for batch in calibration:
            calibration.forward(model, batch)
    for path, largest in found.items():
        if not bool(largest.isfinite().all()):
            raise InputError(f"{path}: its calibration activations hold NaN or infinity; check the data and the dtype")
    return {ref.path: found[ref.path] for ref in refs if ref.path in found}
