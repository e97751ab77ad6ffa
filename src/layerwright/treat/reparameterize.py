"""One range for all channels behind a norm: clip the outliers' ranges, then move what is left of the differences.

Post-norm activations have a few channels of far larger range than the others. Each channel gets a grid of its own
(`channel_params`); grids that stand out are clipped to what the others have (`clip_channel_params`); then channel `d` is
divided by ``r_d = s_d / mean(s)`` and shifted so that all share one scale and one zero point, in the norm's own weight
and bias, and its readers take the opposite (`reparameterize_norm_`). In floating point nothing changes.

Sources: Li et al. (2023), RepQ-ViT, arXiv 2212.08254, for the move; Ranjan and Savakis (2024), arXiv 2401.11243, for the
clipping, whose exact rule is ours. Without it this is RepQ-ViT.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError
from layerwright.nn.quantizer import grid
from layerwright.treat.activations.ranges import PERCENTILES
from layerwright.treat.migrate import NormReaders, find_norm_readers, migrate_, sample_norms, unchanged

__all__ = [
    "channel_params",
    "clip_channel_params",
    "reparameterize_",
    "reparameterize_norm_",
    "shared_grid",
]

Rule = Literal["iqr", "std", "percentile", "none"]


def channel_params(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each channel's own grid, codes from 0 to ``2**bits - 1``.

    The range of a channel is cut at the percentile of least squared error (99.9, 99.99 or 99.999 %); it need not hold
    zero, and the zero point is not rounded: ``zero = -lowest / scale``.

    Args:
        x: ``(tokens, channels)``.
        bits: 2 to 8.

    Returns:
        ``(channels,)`` each, float32. A constant channel has scale 0, and its value in the other: ``zero = -value``.
    """
    levels = _levels(bits)
    rows = x.detach().float().T.contiguous()
    ordered = rows.sort(-1).values
    count = ordered.shape[-1]
    scale, low = torch.zeros(len(rows)), ordered[:, 0].clone()
    least = torch.full((len(rows),), torch.inf)
    for share in (1.0, *PERCENTILES):
        top = ordered[:, min(round(share * (count - 1)), count - 1)]
        bottom = ordered[:, max(round((1 - share) * (count - 1)), 0)]
        step = (top - bottom) / levels
        safe = torch.where(step > 0, step, torch.ones_like(step))[:, None]
        codes = ((rows - bottom[:, None]) / safe).round().clamp(0, levels)
        error = (rows - bottom[:, None] - codes * safe).square().mean(-1)
        better = error < least
        least = torch.where(better, error, least)
        scale, low = torch.where(better, step, scale), torch.where(better, bottom, low)
    constant = ordered[:, 0] == ordered[:, -1]
    scale = scale.masked_fill(constant, 0.0)
    return scale, torch.where(scale > 0, -low / scale, -ordered[:, 0])


def clip_channel_params(
    scale: Tensor, zero: Tensor, bits: int, rule: Rule = "iqr", k: float = 1.5
) -> tuple[Tensor, Tensor]:
    """Grids whose ends stand out from the other channels', clipped; the others stay bit for bit.

    The lowest values ``m_d = -z_d s_d`` and the highest ones are each clipped across channels: to
    ``[Q1 - k IQR, Q3 + k IQR]`` (`iqr`), to ``mean +- k std`` (`std`), or between the percentiles ``k`` and ``100 - k``
    (`percentile`). What lies beyond then saturates.

    Args:
        scale, zero: ``(channels,)`` of `channel_params`.
        bits: of the codes.
        rule: see above; `none` clips nothing.
        k: not negative; infinity clips nothing; for `percentile` below 50.

    Returns:
        New scale and zero point.
    """
    if rule not in ("iqr", "std", "percentile", "none") or not k >= 0 or (rule == "percentile" and k >= 50):
        raise InputError(
            f"clip: got rule {rule!r} and k {k}; expected iqr, std, percentile or none, and k from 0 (percentile: to 50)"
        )
    if rule == "none" or k == float("inf"):
        return scale, zero
    levels = _levels(bits)
    low = torch.where(scale > 0, -zero * scale, -zero)
    high = low + levels * scale
    bottom, top = (value.clamp(*_fences(value, rule, k)) for value in (low, high))
    # A channel all of whose values stand out would be left without any range: it stays as it is, as a constant does.
    changed = ((bottom != low) | (top != high)) & (top > bottom) & (scale > 0)
    step = (top - bottom) / levels
    return torch.where(changed, step, scale), torch.where(changed, -bottom / step.clamp(min=1e-30), zero)


def _fences(values: Tensor, rule: Rule, k: float) -> tuple[float, float]:
    wide = values.double()
    if rule == "std":
        spread = float(wide.std(correction=0)) * k
        return float(wide.mean()) - spread, float(wide.mean()) + spread
    if rule == "percentile":
        return float(wide.quantile(k / 100)), float(wide.quantile(1 - k / 100))
    first, third = float(wide.quantile(0.25)), float(wide.quantile(0.75))
    return first - k * (third - first), third + k * (third - first)


def shared_grid(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """What makes channels with grids of their own fit one: ``X' = (X - offset) / divisor``.

    Args:
        scale, zero: ``(channels,)`` of `channel_params`; a channel of scale 0 is only moved.

    Returns:
        ``(divisor r, offset, s, z)``: ``(channels,)`` float64 both, and the grid whose lowest value is ``-z s``.
    """
    if bool((scale < 0).any()):
        raise InputError(f"scale: expected numbers from 0, the least is {float(scale.min()):.3g}")
    constant = scale == 0
    mean = float(scale[~constant].double().mean()) if bool((~constant).any()) else 1.0
    steps = torch.where(constant, mean, scale.double())
    lowest = torch.where(constant, -zero, -zero * scale).double()
    # Any common zero point serves; one from 0 keeps 0 a value of the grid.
    common = float((-lowest / steps).mean().clamp(min=0))
    return steps / mean, lowest + common * steps, mean, common


def reparameterize_norm_(
    model: nn.Module, group: NormReaders, scale: Tensor, zero: Tensor, *, shift: bool = True
) -> tuple[float, float]:
    """Make one grid out of the channels' grids behind a norm, in place; the function of the model stays.

    ``s = mean(s_d)``, ``z = mean(z_d)``, ``r_d = s_d / s``; the norm's output becomes ``X / r - t`` with
    ``t_d = m_d / r_d + z s``, so that every channel begins at ``-z s`` with steps of ``s``.

    Args:
        model: changed: the norm's parameters and its readers' are replaced.
        group: from `find_norm_readers`.
        scale, zero: ``(channels,)`` of `channel_params`, clipped or not.
        shift: also move the zero points; without, only the factors.

    Returns:
        ``(s, z)`` of the grid that serves all channels.

    Raises:
        InputError: a shift where none can be moved (a norm without bias, padding), or what else `migrate_` refuses.
    """
    if shift and not group.shift:
        raise InputError(
            f"{group.norm}: it has no bias to shift (or zeros are padded to its output); use shift: false, which moves "
            "the factors only, or shift: auto"
        )
    if scale.shape != (group.channels,):
        raise InputError(f"{group.norm}: expected {group.channels} scales, got {tuple(scale.shape)}")
    divisor, offset, step, common = shared_grid(scale, zero)
    migrate_(model, group, divisor, offset if shift else None)
    return step, common


def reparameterize_(
    model: nn.Module,
    calibration: Calibration,
    *,
    seed: int = 0,
    bits: int = 4,
    rule: Rule = "std",
    k: float = 3.0,
    shift: bool | Literal["auto"] = "auto",
) -> list[str]:
    """Clip and reparameterise every norm that only linear layers read.

    Args:
        model: changed in place (parameters are replaced); its function stays.
        calibration: gives the ranges.
        seed: of the sample.
        bits: of the channels' grids.
        rule, k: see `clip_channel_params`; rule `none` is RepQ-ViT.
        shift: also move zero points; `auto` where the norm can.

    Returns:
        One sentence for each norm.

    Raises:
        InputError: settings out of range, or no norm that could be changed.
    """
    if shift not in (True, False, "auto"):
        raise InputError(f"shift: got {shift!r}, expected true, false or auto")
    groups = tuple(group for group in find_norm_readers(model, calibration) if not group.others)
    if not groups:
        raise InputError("reparameterize: no norm whose output only goes into linear layers; leave this step out")
    samples = sample_norms(model, calibration, groups, seed=seed)
    notes = []
    with unchanged(model, calibration):
        for group in groups:
            before = channel_params(samples[group.norm].values(group.norm), bits)
            scale, zero = clip_channel_params(*before, bits, rule, k)
            clipped = int(((scale != before[0]) | (zero != before[1])).sum())
            step, _ = reparameterize_norm_(model, group, scale, zero, shift=group.shift if shift == "auto" else shift)
            notes.append(
                f"{group.norm}: one grid of step {step:.3g} for {group.channels} channels ({clipped} clipped), moved into "
                f"{', '.join(group.readers)}"
            )
    return notes


def _levels(bits: int) -> int:
    low, high = grid(bits)
    return high - low
