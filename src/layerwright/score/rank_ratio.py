"""How much of its width a layer uses: rank and nuclear norm of what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.capture import first_tensor, watch_outputs
from layerwright.core.errors import InputError

__all__ = ["RankReport", "rank_ratio", "score_layers_rank"]

_GRAM_TOLERANCE = 1e-6
"""Below it singular values are not taken from products of rows, whose rounding squares them."""


@dataclass(frozen=True)
class RankReport:
    """What the outputs of a layer span.

    Attributes:
        rank: singular values of the outputs above the tolerance times the largest one.
        ratio: `rank` over `width`.
        width: channels or features of the output.
        d_in: channels or features of the input; without a non-linearity behind the layer, the rank is at most that
            times the kernel's size, plus one for the bias.
        nuclear: ``||Y||_* / (sqrt(width) ||Y||_F)`` in (0, 1] of the outputs less their means; smooth where the rank jumps.
    """

    rank: int
    ratio: float
    width: int
    d_in: int
    nuclear: float


def rank_ratio(
    features: Tensor,
    tol: float | None = 1e-2,
    method: Literal["svd", "nuclear"] = "svd",
    *,
    centre: bool = False,
) -> float:
    """Rank of `features` ``(width, samples)`` over their width, in [0, 1]: 1 where no feature is wasted.

    Singular values come from ``features @ features.T`` in float64 where that is exact enough. Source: Han et al., 2021,
    Rethinking Channel Dimensions for Efficient Model Design, arXiv 2007.00992.

    Args:
        features: as many samples as features, or more.
        tol: singular values up to `tol` times the largest count as zero; in (0, 1). None: the precision of the dtype times
            the larger side, at which hardly any non-linear layer is short of rank.
        method: ``svd`` counts singular values; ``nuclear`` gives ``||Y||_* / (sqrt(width) ||Y||_F)`` without a tolerance.
        centre: take the mean of each feature off first.

    Raises:
        InputError: no matrix, too few samples, values that are not finite, a tolerance outside its range.
    """
    if features.dim() != 2 or not features.shape[0]:
        raise InputError(f"features: got shape {tuple(features.shape)}, expected (width, samples)")
    if method not in ("svd", "nuclear"):
        raise InputError(f"method: got {method!r}, expected 'svd' or 'nuclear'")
    width, samples = features.shape
    _check_samples("features", width, samples)
    precision = torch.finfo(features.dtype).eps * max(width, samples) if features.is_floating_point() else 2**-52
    tol = precision if tol is None else _checked_tolerance(tol)
    values = features.detach().double()
    if not bool(values.isfinite().all()):
        raise InputError("features: got NaN or infinite values, expected finite ones")
    if centre:
        values = values - values.mean(1, keepdim=True)
    short = samples < 2 * width or (method == "svd" and tol < _GRAM_TOLERANCE)
    singular = torch.linalg.svdvals(values) if short else _roots(values @ values.T)
    return _nuclear(singular) if method == "nuclear" else _rank(singular, tol) / width


def score_layers_rank(
    model: nn.Module, data: Any, layers: Sequence[str] | None = None, *, tol: float = 1e-2
) -> dict[str, RankReport]:
    """What the outputs of each layer span over all samples and positions of `data`; a low ratio is a bottleneck.

    A linear layer in itself has at most the rank of its input: name the activation behind it, or the module that holds
    both, such as ``blocks.3.expand`` of `layerwright.models.ReXNet`, to see what the non-linearity makes of it. Only
    products of rows ``(width, width)`` are kept, in float64.

    Args:
        data: batches, or a `Calibration`.
        layers: names of modules; all linear layers and convolutions if left out. Channels are the last axis of what linear
            layers give, the second one of maps ``(batch, channels, height, width)``, and the last one of anything else.
        tol: see `rank_ratio`; at least 1e-6.

    Raises:
        InputError: names that are not there, layers that did not run, fewer samples and positions than channels, values
            that are not finite, a tolerance outside its range.
    """
    if _checked_tolerance(tol) < _GRAM_TOLERANCE:
        raise InputError(f"tol: got {tol}, expected at least {_GRAM_TOLERANCE}, since sums of products are kept")
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, kinds)] if layers is None else list(layers)
    missing = [name for name in names if name not in modules]
    if missing or not names:
        known = ", ".join([name for name in modules if name][:40])
        raise InputError(f"layers: got {', '.join(missing) or 'none'}, expected some of {known}")
    spans: dict[str, _Span] = {}

    def see(name: str, args: Any, output: Any) -> None:
        outputs = _rows(modules[name], first_tensor(output))
        inputs = first_tensor(args)
        d_in = inputs.shape[_channel_axis(modules[name], inputs)]
        spans.setdefault(name, _Span(outputs.shape[0], d_in, outputs.device)).add_(name, outputs)

    batches = as_calibration(data)
    with torch.no_grad(), evaluating(model), watch_outputs(model, names, see):
        for batch in batches:
            batches.forward(model, batch)
    idle = [name for name in names if name not in spans]
    if idle:
        raise InputError(f"layers: {', '.join(idle)} did not run; give data, and layers that the model calls")
    return {name: spans[name].report(name, tol) for name in names}


class _Span:
    """Sums over samples from which singular values follow."""

    def __init__(self, width: int, d_in: int, device: torch.device) -> None:
        self.d_in, self.count = d_in, 0
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)

    def add_(self, name: str, rows: Tensor) -> None:
        if len(rows) != len(self.total):
            raise InputError(f"{name}: got outputs of {len(self.total)} and of {len(rows)} channels; name it alone")
        self.products += rows @ rows.T
        self.total += rows.sum(1)
        self.count += rows.shape[1]

    def report(self, name: str, tol: float) -> RankReport:
        width = len(self.total)
        _check_samples(name, width, self.count)
        if not bool(self.products.isfinite().all()):
            raise InputError(f"{name}: its outputs hold NaN or infinite values, expected finite ones")
        rank = _rank(_roots(self.products), tol)
        centred = self.products - torch.outer(self.total, self.total) / self.count
        return RankReport(rank, rank / width, width, self.d_in, _nuclear(_roots(centred)))


def _channel_axis(module: nn.Module, value: Tensor) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return value.dim() - len(module.kernel_size) - 1
    return -1 if isinstance(module, nn.Linear) or value.dim() < 4 else 1


def _rows(module: nn.Module, output: Tensor) -> Tensor:
    """``(channels, samples x positions)`` in float64."""
    return output.detach().double().movedim(_channel_axis(module, output), 0).flatten(1)


def _roots(products: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(products).clamp_min(0).sqrt()


def _rank(singular: Tensor, tol: float) -> int:
    return int((singular > tol * singular.max()).sum())


def _nuclear(singular: Tensor) -> float:
    norm = float(singular.norm())
    return float(singular.sum()) / (len(singular) ** 0.5 * norm) if norm else 0.0


def _check_samples(name: str, width: int, samples: int) -> None:
    if samples < width:
        raise InputError(
            f"{name}: got {samples} samples of {width} features, which caps the rank at {samples}; "
            f"give at least {width} samples"
        )


def _checked_tolerance(tol: float) -> float:
    if not 0 < tol < 1:
        raise InputError(f"tol: got {tol}, expected a share of the largest singular value in (0, 1)")
    return tol
