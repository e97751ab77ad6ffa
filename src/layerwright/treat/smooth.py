"""Even out the channels that a norm hands on, by its readers' weights or by a logarithm."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.errors import InputError
from layerwright.core.layer import get_parameter
from layerwright.treat.migrate import NormReaders, find_norm_readers, migrate_, unchanged

__all__ = ["channel_ranges", "log_factors", "smooth_"]


def channel_ranges(
    model: nn.Module, calibration: Calibration, groups: tuple[NormReaders, ...]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and largest value ``(channels,)`` float32 of each norm's output over the calibration, by path of the norm."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for group in groups:

        def hook(_module: nn.Module, _args: Any, output: Tensor, path: str = group.norm) -> None:
            flat = output.detach().reshape(-1, output.shape[-1]).float()
            low, high = flat.amin(0), flat.amax(0)
            before = found.get(path, (low, high))
            found[path] = torch.minimum(before[0], low), torch.maximum(before[1], high)

        handles.append(model.get_submodule(group.norm).register_forward_hook(hook))
    try:
        with torch.no_grad(), evaluating(model):
            for batch in calibration:
                calibration.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for path, (low, high) in found.items():
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise InputError(f"{path}: its calibration activations hold NaN or infinity; check the data and the dtype")
    return found


def smooth_(
    model: nn.Module,
    calibration: Calibration,
    *,
    seed: int = 0,
    rule: Literal["balance", "log", "none"] = "balance",
    alpha: float = 0.5,
    shift: bool | Literal["auto"] = False,
) -> list[str]:
    """Move channel ranges from activations into weights, for every norm whose readers allow it.

    Args:
        model: changed in place (parameters are replaced); its function stays.
        calibration: gives the ranges.
        seed: nothing is random here.
        rule: `balance` divides by ``max|x|**alpha / max|W|**(1 - alpha)`` (Xiao et al., 2023, SmoothQuant); `log` by
            ``m / log2(2 + m)`` for a channel's largest size `m` (Li et al., 2023, FPTQ); `none` only shifts.
        alpha: share of the range that moves, 0 to 1.
        shift: also centre each channel (Tai and Wu, 2024, MPTQ-ViT); `auto` where the norm can.

    Returns:
        One sentence for each norm.

    Raises:
        InputError: settings out of range, or no norm that could be changed.
    """
    if rule not in ("balance", "log", "none") or not 0 <= alpha <= 1:
        raise InputError(f"smooth: got rule {rule!r}, alpha {alpha}; expected balance, log or none, and 0 to 1")
    found = find_norm_readers(model, calibration)
    groups = tuple(group for group in found if not group.others)
    if not groups:
        raise InputError(
            f"smooth: no norm whose output only goes into linear layers{_first_reason(found)}; this model cannot be smoothed"
        )
    ranges = channel_ranges(model, calibration, groups)
    notes = []
    with unchanged(model, calibration):
        for group in groups:
            low, high = ranges[group.norm]
            moved = (high + low) / 2 if shift and group.shift else None
            if shift is True and not group.shift:
                raise InputError(f"{group.norm}: its output cannot be shifted (no bias, or padded); use shift: auto")
            size = torch.maximum(low.abs(), high.abs()) if moved is None else (high - low) / 2
            migrate_(model, group, _factors(model, group, size, rule, alpha), moved)
            words = "shifted and smoothed" if moved is not None else "smoothed"
            notes.append(f"{group.norm}: {words} into {', '.join(group.readers)}")
    return notes


def log_factors(size: Tensor) -> Tensor:
    """``m / log2(2 + m)`` for the largest size `m` of each channel; 1 for one below 1e-5 (Li et al., 2023, FPTQ)."""
    return torch.where(size < 1e-5, torch.ones_like(size), size / torch.log2(2 + size))


def _first_reason(found: tuple[NormReaders, ...]) -> str:
    """The first norm that something else reads too, and what."""
    return f" ({found[0].norm} is also read by {', '.join(found[0].others[:3])})" if found else ""


def _factors(model: nn.Module, group: NormReaders, size: Tensor, rule: str, alpha: float) -> Tensor:
    """``(channels,)``; 1 for a channel that is constant or all but dead."""
    if rule == "none":
        return torch.ones_like(size)
    if rule == "log":
        return log_factors(size)
    else:
        weight = torch.zeros_like(size)
        for path in group.readers:
            reader = model.get_submodule(path)
            columns = get_parameter(model, f"{path}.weight").detach().float().abs()
            weight = torch.maximum(weight, columns.amax(0) if isinstance(reader, nn.Linear) else columns.amax(1))
        factors = size.pow(alpha) / weight.clamp(min=1e-8).pow(1 - alpha)
    factors = torch.where(size < 1e-5, torch.ones_like(size), factors)
    return factors.clamp(1e-4, 1e4) if math.isfinite(float(factors.sum())) else torch.ones_like(size)
