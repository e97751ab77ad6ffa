"""Ranges of activation quantizers from samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.nn.activation import ActivationQuantizer, round_two_regions
from layerwright.nn.quantizer import fake_quantize, find_scale, mse_clip, range_scale
from layerwright.treat.activations._samples import Samples

__all__ = [
    "fit_log",
    "fit_power_of_two",
    "fit_quantizer",
    "fit_two_regions",
    "fit_uniform",
    "hessian_error",
    "search_region_ratio",
]

Observer = Literal["minmax", "mse", "percentile", "output", "hessian", "power_of_two"]
PERCENTILES = (0.999, 0.9999, 0.99999)
"""Candidates of the percentile observer (Li et al., 2023, RepQ-ViT)."""
SHARES = tuple(1 - 0.05 * i for i in range(11))
"""Shares of the largest value that the two-region search tries."""

SEARCHED = 1 << 17
"""Values of a sample that the two-region search rounds for every candidate."""

Error = Callable[[Tensor, Tensor], Tensor]
"""``error(x, rounded x)``: one number, lower is better."""


def squared_error(x: Tensor, rounded: Tensor) -> Tensor:
    """Mean squared difference."""
    return (x - rounded).square().mean()


def output_error(weight: Tensor) -> Error:
    """Mean squared change of ``x @ weight.T`` for `weight` ``(out, in)``."""
    return lambda x, rounded: ((x - rounded) @ weight.T.float()).square().mean()


def hessian_error(weight: Tensor, moment: Tensor) -> Error:
    """Second-order rise of the loss, ``mean (dy)^T moment dy / 2`` for ``dy = (x - rounded x) @ weight.T``.

    Args:
        weight: ``(out, in)``.
        moment: second moment of the loss's gradient at the layer's output, ``(out, out)`` or its diagonal ``(out,)``
            (`layerwright.score.gradients.output_gradients`).

    Source: the Hessian-guided metric of Yuan et al. (2022), PTQ4ViT, which takes the diagonal.
    """
    g = moment.float()

    def error(x: Tensor, rounded: Tensor) -> Tensor:
        moved = (x - rounded) @ weight.T.float()
        return ((moved @ g if g.dim() == 2 else moved * g) * moved).sum(-1).mean() / 2

    return error


def fit_uniform(
    samples: Samples,
    bits: int,
    name: str,
    *,
    channel: bool = False,
    symmetric: bool = False,
    observer: Observer = "mse",
    error: Error = squared_error,
) -> tuple[Tensor, Tensor | None]:
    """Scale ``(1,)`` (or ``(channels,)``) float32 and zero point int8 (None if symmetric) of an affine grid.

    Args:
        samples: what was seen.
        bits: 2 to 8.
        name: of the layer, for errors.
        channel: one range for each channel instead of one for all.
        symmetric: no zero point.
        observer: `minmax` takes the exact extremes; `mse` shrinks them by the share of least squared error;
            `percentile` takes the best of `PERCENTILES`; `output` shrinks them by the least `error`.
        error: for `output`.
    """
    x = samples.values(name)
    assert samples.low is not None and samples.high is not None
    low, high = (samples.low, samples.high) if channel else (samples.low.min()[None], samples.high.max()[None])
    rows = x.T.contiguous() if channel else x.reshape(1, -1)
    if observer == "minmax":
        return range_scale(low, high, bits, symmetric)
    if observer == "mse":
        clip = mse_clip(rows, bits, symmetric=symmetric).squeeze(-1)
        sample_low, sample_high = rows.amin(-1), rows.amax(-1)
        return range_scale(sample_low, sample_high, bits, symmetric, clip=clip)
    if observer == "percentile":
        return _best_percentile(rows, bits, symmetric)
    best: tuple[Tensor, Tensor | None] | None = None
    least = float("inf")
    for share in [1 - 0.01 * i for i in range(0, 90, 3)]:
        scale, zero = range_scale(low, high, bits, symmetric, clip=share)
        if channel:
            rounded = fake_quantize(x, scale, zero, bits)
        else:
            rounded = fake_quantize(x, scale.reshape(()), None if zero is None else zero.reshape(()), bits)
        found = float(error(x, rounded))
        if found < least:
            best, least = (scale, zero), found
    if best is None:
        raise InputError(f"{name}: no range has a finite error; check its weights and calibration data")
    return best


def _best_percentile(rows: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """By row, the percentile of least squared error."""
    ordered = rows.sort(-1).values
    count = ordered.shape[-1]
    least = torch.full((len(rows),), torch.inf)
    scale, zero = find_scale(rows, bits, -1, symmetric)
    scale, zero = scale.squeeze(-1), None if zero is None else zero.squeeze(-1)
    for share in PERCENTILES:
        high = ordered[:, min(round(share * (count - 1)), count - 1)]
        low = ordered[:, max(round((1 - share) * (count - 1)), 0)]
        s, z = range_scale(low, high, bits, symmetric)
        rounded = fake_quantize(rows, s[:, None], None if z is None else z[:, None], bits)
        found = (rows - rounded).square().mean(-1)
        better = found < least
        least = torch.where(better, found, least)
        scale = torch.where(better, s, scale)
        zero = torch.where(better, z, zero) if z is not None and zero is not None else None
    return scale, zero


def fit_power_of_two(samples: Samples, bits: int, name: str) -> tuple[Tensor, Tensor]:
    """One step times 1, 2, 4 or 8 for each channel, and one zero point: scale ``(channels,)``, zero int8 ``(channels,)``.

    Eight times the step covers the range of the whole tensor, so that every channel can be held; each channel takes the
    multiple of least squared error, and shifts by whole bits bring all to one scale in integer arithmetic. For inputs
    of norms, whose channels differ in range. Memory: four times the sample. Source: Lin et al. (2022), FQ-ViT, arXiv
    2111.13824.
    """
    x = samples.values(name)
    assert samples.low is not None and samples.high is not None
    largest, zero = range_scale(samples.low.min()[None], samples.high.max()[None], bits, symmetric=False)
    assert zero is not None
    scales = largest / 8 * torch.tensor([8.0, 4.0, 2.0, 1.0])
    errors = torch.stack(
        [(x - fake_quantize(x, scale.reshape(()), zero.reshape(()), bits)).square().mean(0) for scale in scales]
    )
    return scales[errors.argmin(0)], zero.expand(x.shape[1]).contiguous()


def fit_log(samples: Samples, quantizer: ActivationQuantizer, name: str) -> Tensor:
    """Scale ``(1,)`` of a logarithmic grid: the largest value or one of `PERCENTILES`, by squared error."""
    x = samples.values(name)
    assert samples.high is not None
    if bool((x < 0).any()):
        raise InputError(f"{name}: a {quantizer.kind} grid is for values from 0 to 1, some are negative; use uniform")
    flat = x.flatten().sort().values
    places = [min(round(share * (len(flat) - 1)), len(flat) - 1) for share in PERCENTILES]
    candidates = [samples.high.max(), *(flat[place] for place in places)]
    best, least = candidates[0].clamp(min=1e-12), float("inf")
    for scale in candidates:
        if scale <= 0:
            continue
        found = float(squared_error(x, quantizer.set_(scale.reshape(1))(x)))
        if found < least:
            best, least = scale, found
    return best.reshape(1)


def search_region_ratio(
    x: Tensor,
    bits: int,
    *,
    signed: bool,
    error: Error = squared_error,
    largest_ratio: int | None = None,
    largest: Tensor | None = None,
) -> tuple[int, Tensor, Tensor]:
    """OPT-m: the ratio of the two regions' steps, and the share of the largest value, of least error, by trying all.

    Args:
        x: ``(tokens, channels)``.
        bits: 3 to 8; one of them says which region.
        signed: whether the fine region has negative codes (the output of GELU) or not (probabilities).
        error: ``error(x, rounded)``; by default the squared error of `x` itself.
        largest_ratio: ratios tried are 2**0 to 2**largest_ratio; by default ``bits + 2``.
        largest: the value that shares are taken of; by default the largest of `x`.

    Returns:
        ``(ratio, scale (1,), losses (ratios, shares))``, where `scale` is the fine step.

    Source: Tai and Wu (2024), arXiv 2401.14895; the two-region grid of Tai et al. (2023).
    """
    if not 3 <= bits <= 8:
        raise InputError(f"bits: got {bits} for two regions, expected 3 to 8 (one bit says which region)")
    top = (1 << (bits - 1)) - 1
    largest = (x.max() if largest is None else largest).clamp(min=1e-8)
    ratios = range((bits + 2 if largest_ratio is None else largest_ratio) + 1)
    losses = torch.empty(len(ratios), len(SHARES))
    for row, ratio in enumerate(ratios):
        for column, share in enumerate(SHARES):
            scale = largest * share / top / 2**ratio
            losses[row, column] = error(x, round_two_regions(x, scale, bits, ratio, signed=signed))
    if not bool(losses.isfinite().any()):
        raise InputError("two regions: no ratio has a finite error; check the weights and the calibration data")
    best = int(losses.nan_to_num(nan=torch.inf).argmin())
    ratio, share = ratios[best // len(SHARES)], SHARES[best % len(SHARES)]
    return ratio, (largest * share / top / 2**ratio).reshape(1), losses


def fit_two_regions(
    samples: Samples, bits: int, name: str, *, signed: bool | None = None, error: Error = squared_error
) -> ActivationQuantizer:
    """A two-region quantizer with the ratio and range of least error (`search_region_ratio`)."""
    x = samples.values(name)
    signed = bool((x < 0).any()) if signed is None else signed
    assert samples.high is not None
    part = x[: max(SEARCHED // x.shape[1], 16)]  # kept rows are in random order
    ratio, scale, _ = search_region_ratio(part, bits, signed=signed, error=error, largest=samples.high.max())
    return ActivationQuantizer(bits, "two_region", ratio=ratio, signed=signed).set_(scale)


def fit_quantizer(
    samples: Samples,
    bits: int,
    name: str,
    *,
    kind: Literal["uniform", "log2", "log_sqrt2", "two_region"] = "uniform",
    share: Literal["tensor", "channel", "token"] = "tensor",
    symmetric: bool = False,
    observer: Observer = "mse",
    weight: Tensor | None = None,
    moment: Tensor | None = None,
) -> ActivationQuantizer:
    """A quantizer with its range chosen from `samples`.

    Args:
        samples: what was seen; not looked at for `token`.
        bits: 2 to 8.
        name: of the layer, for errors.
        kind, share, symmetric: see `ActivationQuantizer`.
        observer: see `fit_uniform`; `output` needs `weight`, `hessian` also `moment` (`hessian_error`), `power_of_two`
            (`fit_power_of_two`) `share` channel.
        weight: ``(out, in)`` of the layer that reads.
        moment: of the loss's gradient at that layer's output.

    Raises:
        InputError: nothing was seen, or what was seen does not fit the grid; names the layer.
    """
    error: Error = squared_error
    if observer in ("output", "hessian"):
        if weight is None or (observer == "hessian" and moment is None):
            raise InputError(
                f"{name}: observer {observer} needs the weight that reads these activations (and gradients)"
            )
        error = output_error(weight) if moment is None or observer == "output" else hessian_error(weight, moment)
        observer = "output"  # the search is the same
    if observer == "power_of_two" and (share != "channel" or symmetric or kind != "uniform"):
        raise InputError(f"{name}: observer power_of_two needs a uniform grid, share: channel and symmetric: false")
    if kind == "two_region":
        return fit_two_regions(samples, bits, name, error=error)
    if share == "token":
        return ActivationQuantizer(bits, kind, "token", symmetric=symmetric)
    x = samples.values(name)
    channels = x.shape[1] if share == "channel" else 0
    quantizer = ActivationQuantizer(bits, kind, share, symmetric=symmetric, channels=channels)
    if kind != "uniform":
        return quantizer.set_(fit_log(samples, quantizer, name))
    if observer == "power_of_two":
        return quantizer.set_(*fit_power_of_two(samples, bits, name))
    channel = share == "channel"
    fit = fit_uniform(samples, bits, name, channel=channel, symmetric=symmetric, observer=observer, error=error)
    return quantizer.set_(*fit)
