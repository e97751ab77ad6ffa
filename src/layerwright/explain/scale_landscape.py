"""The loss over a plane of weight scales: how jagged it is, compared with the plane of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration, as_calibration, evaluating, logits_of
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.kept_blocks import KeptBlocks
from layerwright.core.layers import structure_copy
from layerwright.tune._scales import blocks_with_scales
from layerwright.tune.losses import output_loss

__all__ = ["Landscape", "roughness", "scale_landscape"]

Loss = Literal["task", "infonce", "mse", "kl", "cosine"]
Write = Callable[[Tensor], None]


@dataclass(frozen=True)
class Landscape:
    """Losses around a point.

    Attributes:
        grid: ``(n, n)`` float64; the middle is the model as it is, rows go along the first direction.
        steps: ``(n,)`` multiples of the directions, -1 to 1.
        radius: length of a direction over the length of the parameters.
        loss: which one.
        params: what was moved.
    """

    grid: Tensor
    steps: Tensor
    radius: float
    loss: str
    params: str

    @property
    def roughness(self) -> float:
        """See `roughness`."""
        return roughness(self.grid)


def roughness(grid: Tensor) -> float:
    """Mean size of the second differences along both axes of `grid` ``(n, n)``, over the range of its values.

    0 for a plane and for a constant; about ``4 / n**2`` for a smooth bowl; of the order of 1 for noise.

    Raises:
        InputError: fewer than 3 values along an axis, or values that are not finite.
    """
    if grid.dim() != 2 or min(grid.shape) < 3 or not bool(grid.isfinite().all()):
        raise InputError(f"grid: got {tuple(grid.shape)}, expected finite values of at least (3, 3)")
    z = grid.double()
    span = float(z.max() - z.min())
    second = torch.cat([z.diff(n=2, dim=0).flatten(), z.diff(n=2, dim=1).flatten()])
    return float(second.abs().mean()) / span if span > 0 else 0.0


def scale_landscape(
    model: nn.Module,
    data: Any,
    block: str,
    loss: Loss = "infonce",
    radius: float = 0.02,
    n: int = 11,
    *,
    reference: nn.Module | None = None,
    params: Literal["weight_scale", "weight"] = "weight_scale",
    temperature: float = 3.0,
    seed: int = 0,
) -> Landscape:
    """Loss of `model` at ``theta + a d1 + b d2`` for `a`, `b` from -1 to 1, with two random Gaussian directions.

    Args:
        model: left as it is; with packed integer weights for `weight_scale`.
        data: a `Calibration` or a list of batches.
        block: path of the module whose parameters move; blocks before it are not run again.
        loss: ``task`` is the model's own on the data's labels; the others compare outputs with those of `reference`.
        radius: length of each direction over the length of `theta`, so that scales and weights can be compared.
        n: points along each axis, odd, at least 3; ``n**2`` partial forwards.
        reference: the original model: its outputs, and the weights that codes are rounded from anew as scales move.
        params: ``weight_scale``, or ``weight`` (all matrices of the block in floating point).
        temperature: of InfoNCE.
        seed: of the directions.

    Raises:
        InputError: settings out of range, an unknown block, a loss without its reference.
        TypeError: no weight scales, or no loss on the labels.

    Source: the probe of Frumkin et al. (2023), arXiv 2308.10814; planes of random directions after Li et al. (2018).
    """
    if n < 3 or n % 2 == 0 or not radius > 0:
        raise InputError(f"got n {n} and radius {radius}, expected an odd number from 3 on and a positive share")
    known = dict(model.named_modules())
    if block not in known:
        raise unknown_name("block", block, known)
    if loss != "task" and reference is None:
        raise InputError(f"loss: {loss} compares with the original model; give reference=, or use task")
    calibration = as_calibration(data)
    copy = structure_copy(model)
    theta, write = _scales(copy, block, reference) if params == "weight_scale" else _weights(copy, block)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2, len(theta), generator=generator).to(theta.device)
    directions *= radius * theta.norm() / directions.norm(dim=1, keepdim=True)
    steps = torch.linspace(-1, 1, n, dtype=torch.float64)
    grid = torch.empty(n, n, dtype=torch.float64)
    measure = _measure(copy, calibration, block, loss, reference, temperature)
    with torch.no_grad(), evaluating(copy):
        for row, a in enumerate(steps.tolist()):
            for column, b in enumerate(steps.tolist()):
                write(theta + a * directions[0] + b * directions[1])
                grid[row, column] = measure()
    return Landscape(grid, steps, radius, loss, params)


def _scales(model: nn.Module, block: str, reference: nn.Module | None) -> tuple[Tensor, Write]:
    (scales,) = blocks_with_scales(model, (block,), reference)
    floor = torch.finfo(torch.float32).eps
    return scales.read(), lambda theta: scales.write_(theta.abs().clamp(min=floor))


def _weights(model: nn.Module, block: str) -> tuple[Tensor, Write]:
    """The block's matrices as one vector; writing replaces parameters of the copy."""
    places = [
        (module, name, parameter)
        for module in model.get_submodule(block).modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() >= 2
    ]
    if not places:
        raise InputError(f"{block}: it has no weight matrix in floating point; use params='weight_scale'")

    def write(theta: Tensor) -> None:
        sizes = [parameter.numel() for *_, parameter in places]
        for (module, name, old), part in zip(places, theta.split(sizes), strict=True):
            module._parameters[name] = nn.Parameter(part.reshape(old.shape).to(old.dtype), requires_grad=False)

    return torch.cat([parameter.detach().float().flatten() for *_, parameter in places]), write


def _measure(
    model: nn.Module, calibration: Calibration, block: str, loss: Loss, reference: nn.Module | None, temperature: float
) -> Callable[[], float]:
    batches = list(calibration)
    try:
        units = [path for stack in find_blocks(model) for path in stack.names]
    except InputError:
        units = []
    runs = KeptBlocks(model, calibration, units, batches)
    runs.keep()
    if loss == "task":
        return lambda: _labelled(calibration, batches, runs.logits(block))
    assert reference is not None
    compare = output_loss(loss, temperature)
    with torch.no_grad(), evaluating(reference):
        wanted = [logits_of(calibration.forward(reference, batch)).float().flatten(0, -2) for batch in batches]

    def measure() -> float:
        found = [float(compare(q, k)) for q, k in zip(runs.logits(block), wanted, strict=True)]
        return sum(found) / len(found)

    return measure


def _labelled(calibration: Calibration, batches: Sequence[Any], logits: Sequence[Tensor]) -> float:
    """Mean cross-entropy on the labels."""
    total = rows = 0.0
    for batch, out in zip(batches, logits, strict=True):
        labels = (
            batch.get("labels") if isinstance(batch, dict) else batch[1] if isinstance(batch, tuple | list) else None
        )
        if not isinstance(labels, Tensor) or labels.numel() != len(out):
            raise TypeError("loss: task needs batches with one label for each row of logits; use kl, mse or infonce")
        total += float(nn.functional.cross_entropy(out.double(), labels.flatten(), reduction="sum"))
        rows += len(out)
    return total / rows
