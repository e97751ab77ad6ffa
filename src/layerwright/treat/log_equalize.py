"""Logarithmic equalization of activations, layer by layer where their range asks for it (Li et al., 2023, FPTQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers, treatable
from layerwright.score.activation_range import activation_range
from layerwright.treat.migrate import NormReaders, find_norm_readers, migrate_, unchanged
from layerwright.treat.smooth import log_factors

__all__ = ["Equalizable", "equalizable_layers", "log_equalize_"]


@dataclass(frozen=True)
class Equalizable:
    """Layers that read one tensor, and what it comes out of.

    Attributes:
        readers: paths; all of them get the same factors.
        norm: the norm, with everything that reads it; None for a gated product.
        up: path of the layer whose rows take the division, where the readers read ``act(gate) * up``.
    """

    readers: tuple[str, ...]
    norm: NormReaders | None = None
    up: str = ""


def equalizable_layers(model: nn.Module, calibration: Calibration) -> tuple[Equalizable, ...]:
    """Every input that can be equalized without a multiplication at run time.

    Norms are followed through one batch (`find_norm_readers`); those with other readers, and those that feed a head or
    a shared weight, are left out. ``down`` of a gated block reads ``act(gate) * up``, so that a factor moves into the
    rows of ``up``.
    """
    refs = list_layers(model)
    allowed = {ref.path for ref in treatable(model, refs)}
    found = [
        Equalizable(group.readers, norm=group)
        for group in find_norm_readers(model, calibration)
        if not group.others and allowed.issuperset(group.readers)
    ]
    by_place: dict[str, dict[str, Any]] = {}
    for ref in refs:
        if ref.path in allowed and ref.layout == "linear" and ref.role in ("gate", "up", "down"):
            by_place.setdefault(ref.path.rpartition(".")[0], {})[ref.role] = ref
    for roles in by_place.values():
        if len(roles) == 3 and roles["up"].shape[0] == roles["down"].shape[1] == roles["gate"].shape[0]:
            found.append(Equalizable((roles["down"].path,), up=roles["up"].path))
    return tuple(found)


def log_equalize_(
    model: nn.Module,
    calibration: Calibration,
    *,
    seed: int = 0,
    v0: float = 15.0,
    v1: float = 150.0,
    layers: Sequence[str] | str | None = None,
) -> list[str]:
    """Divide what chosen layers read by ``s = m / log2(2 + m)``, exactly, for the largest size `m` of each channel.

    A channel's largest size becomes ``log2(2 + m)``: 1 to 1000 shrinks to 1.6 to 10. A dead channel (`m` below 1e-5)
    is left alone. The division goes into the norm before (or the rows of ``up`` before a gated ``down``), the product
    into the columns of every reader; sizes are those of the model as it was given, in one pass.

    Args:
        model: changed in place (parameters are replaced); its function stays.
        calibration: gives the sizes.
        seed: nothing is random here.
        v0, v1: inputs whose largest size lies between them are equalized.
        layers: paths to equalize instead, whatever their range: a list, or a text with spaces between (as in a plan).

    Returns:
        One sentence for each input that was equalized.

    Raises:
        InputError: bounds out of order, a layer of `layers` whose input cannot be equalized, or the model's function
            would change.
    """
    if not 0 <= v0 < v1:
        raise InputError(f"v0, v1: got {v0:g} and {v1:g}, expected two bounds of 0 and above, the smaller first")
    layers = layers.split() if isinstance(layers, str) else layers
    inputs = equalizable_layers(model, calibration)
    known = {path for item in inputs for path in item.readers}
    bad = [path for path in layers or () if path not in known]
    if bad:
        raise InputError(
            f"{bad[0]}: its input comes from no norm and no gated product that can take the factor; "
            "round it dynamically instead"
        )
    refs = [ref for ref in list_layers(model) if ref.path in known]
    sizes = activation_range(model, calibration, refs)
    notes = []
    with unchanged(model, calibration):
        for item in inputs:
            seen = [sizes[path] for path in item.readers if path in sizes]
            if not seen:
                continue
            size = torch.stack(seen).amax(0)
            largest = float(size.max())
            wanted = v0 < largest < v1 if layers is None else any(path in layers for path in item.readers)
            if wanted:
                factors = log_factors(size)
                if item.norm is not None:
                    migrate_(model, item.norm, factors)
                else:
                    _into_rows_(model, item.up, item.readers[0], factors)
                after = float(torch.log2(2 + size.max()))
                source = item.norm.norm if item.norm is not None else item.up
                notes.append(f"{source}: range {largest:.1f} to {after:.1f} for {', '.join(item.readers)}")
    return notes


@torch.no_grad()
def _into_rows_(model: nn.Module, up: str, down: str, factors: Tensor) -> None:
    """Divide the rows of `up` and multiply the columns of `down`; parameters are replaced."""
    wide = factors.double()
    for path, change in ((up, 1 / wide[:, None]), (down, wide[None, :])):
        module: Any = model.get_submodule(path)
        weight = module.weight
        new = (weight.double() * change).to(weight.dtype)
        module.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
        if path == up and module.bias is not None:
            bias = module.bias
            module.bias = nn.Parameter((bias.double() / wide).to(bias.dtype), requires_grad=bias.requires_grad)
