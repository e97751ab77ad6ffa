"""Even out the channels that a norm hands on, by its readers' weights or by a logarithm; everywhere, or where it helps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.errors import InputError
from layerwright.core.layer import get_parameter
from layerwright.nn.quantizer import fake_quantize, find_scale, grid, mse_clip
from layerwright.treat.activations import Samples, fit_quantizer
from layerwright.treat.migrate import NormReaders, find_norm_readers, migrate_, sample_norms, unchanged

__all__ = ["channel_ranges", "log_factors", "reader_error", "smooth_"]

LEAST_GAIN = 0.25
"""Share of the error that a change must take away to be made, where norms are judged one by one: what wins a few percent
of one layer's error is as likely to lose in the whole network."""


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
    judge_bits: int | None = None,
) -> list[str]:
    """Move channel ranges from activations into weights, for every norm whose readers allow it.

    Args:
        model: changed in place (parameters are replaced); its function stays.
        calibration: gives the ranges.
        seed: of the sample that norms are judged on.
        rule: `balance` divides by ``max|x|**alpha / max|W|**(1 - alpha)`` (Xiao et al., 2023, SmoothQuant); `log` by
            ``m / log2(2 + m)`` for a channel's largest size `m` (Li et al., 2023, FPTQ); `none` only shifts.
        alpha: share of the range that moves, 0 to 1.
        shift: also centre each channel (Tai and Wu, 2024, MPTQ-ViT); `auto` where the norm can.
        judge_bits: None changes every norm. With a number, a norm gets both, the shift alone, the factors alone or
            nothing, whichever leaves its readers' outputs the least error at that many bits (`reader_error`).

    Returns:
        One sentence for each norm.

    Raises:
        InputError: settings out of range, or no norm that could be changed.
    """
    if rule not in ("balance", "log", "none") or not 0 <= alpha <= 1:
        raise InputError(f"smooth: got rule {rule!r}, alpha {alpha}; expected balance, log or none, and 0 to 1")
    if judge_bits is not None:
        grid(judge_bits)  # refuses what is no width
    found = find_norm_readers(model, calibration)
    groups = tuple(group for group in found if not group.others)
    if not groups:
        raise InputError(
            f"smooth: no norm whose output only goes into linear layers{_first_reason(found)}; this model cannot be smoothed"
        )
    ranges = channel_ranges(model, calibration, groups)
    samples = sample_norms(model, calibration, groups, seed=seed) if judge_bits is not None else {}
    notes = []
    with unchanged(model, calibration):
        for group in groups:
            if shift is True and not group.shift:
                raise InputError(f"{group.norm}: its output cannot be shifted (no bias, or padded); use shift: auto")
            forms = _forms(model, group, ranges[group.norm], rule, alpha, bool(shift and group.shift))
            words = next(iter(forms))
            if judge_bits is not None:
                words = _least_error(model, group, samples[group.norm].values(group.norm), judge_bits, forms)
            if words == "left":
                notes.append(f"{group.norm}: left as it is")
                continue
            migrate_(model, group, *forms[words])
            notes.append(f"{group.norm}: {words} into {', '.join(group.readers)}")
    return notes


_Form = tuple[Tensor, Tensor | None]
"""Factors and shift of a norm's channels."""


def _forms(
    model: nn.Module, group: NormReaders, ends: tuple[Tensor, Tensor], rule: str, alpha: float, shift: bool
) -> dict[str, _Form]:
    """What may be done with one norm, in words; the whole of what is asked for comes first."""
    low, high = ends
    found: dict[str, _Form] = {}
    if shift:
        middle = (high + low) / 2
        found["shifted and smoothed"] = _factors(model, group, (high - low) / 2, rule, alpha), middle
        found["shifted"] = torch.ones_like(low), middle
    found["smoothed"] = _factors(model, group, torch.maximum(low.abs(), high.abs()), rule, alpha), None
    return found


def _least_error(model: nn.Module, group: NormReaders, x: Tensor, bits: int, forms: Mapping[str, _Form]) -> str:
    """What to do with one norm; a change that does not take `LEAST_GAIN` of the error away is not made."""
    errors = {words: reader_error(model, group, x, bits, *form) for words, form in forms.items()}
    best = min(errors, key=lambda words: errors[words])
    plain = reader_error(model, group, x, bits, torch.ones(group.channels))
    return best if errors[best] < (1 - LEAST_GAIN) * plain else "left"


@torch.no_grad()
def reader_error(
    model: nn.Module, group: NormReaders, x: Tensor, bits: int, scale: Tensor, shift: Tensor | None = None
) -> float:
    """Relative squared error of what a norm's readers give when their inputs and weights have `bits` bits.

    Inputs get one asymmetric range for the tensor, weights a symmetric one per output channel, both of least squared
    error, after `scale` and `shift` have moved from the norm into the readers.

    Args:
        model: left as it is.
        group: from `find_norm_readers`.
        x: ``(tokens, channels)`` of the norm's output.
        bits: 2 to 8.
        scale, shift: see `migrate_`.
    """
    moved = (x if shift is None else x - shift) / scale
    samples = Samples(numel=x.numel(), rows=len(x))
    samples.update(moved)
    rounded = fit_quantizer(samples, bits, group.norm)(moved)
    error = total = 0.0
    for path in group.readers:
        weight = get_parameter(model, f"{path}.weight").detach().float()
        weight = weight if isinstance(model.get_submodule(path), nn.Linear) else weight.T
        grown = weight * scale
        grids = find_scale(grown, bits, clip=mse_clip(grown, bits))
        # The shift comes back through the reader's bias, which is not rounded.
        off = rounded @ fake_quantize(grown, *grids, bits).T - moved @ grown.T
        error += float(off.square().sum())
        total += float((x @ weight.T).square().sum())
    return error / max(total, 1e-30)


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
