"""How much a transformer layer's output changes when it alone is pruned or rounded (Yu et al., 2024, EDGE-LLM)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration, as_calibration, evaluating
from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layer import LayerRef, from_matrices, get_parameter, read_matrix
from layerwright.core.layers import treatable
from layerwright.core.lockstep import Lockstep, Stop
from layerwright.core.option import Scores
from layerwright.core.treatment import Quantize, Sparsify, Treatments
from layerwright.score.base import Subject, TreatWeights
from layerwright.score.inputs import forwards

__all__ = ["PROBES", "ProbeTable", "compression_probes", "compression_sensitivity"]

PROBES: Mapping[str, Sequence[float]] = {"prune": (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9), "bits": (4, 8)}
"""Shares of zeros, and widths, that each layer is tried with."""


@dataclass(frozen=True)
class ProbeTable:
    """Mean squared errors of each block's output.

    Attributes:
        prune: block path to ``{share of zeros: error}``.
        bits: block path to ``{bits: error}``.
        samples: calibration samples that were looked at.
        energy: block path to the mean square of its output.
    """

    prune: Mapping[str, Mapping[float, float]]
    bits: Mapping[str, Mapping[int, float]]
    samples: int = 0
    energy: Mapping[str, float] = field(default_factory=dict)

    @property
    def prune_sensitivity(self) -> dict[str, float]:
        """By block, the mean over the shares."""
        return {path: math.fsum(row.values()) / max(len(row), 1) for path, row in self.prune.items()}

    @property
    def bits_sensitivity(self) -> dict[str, float]:
        """By block, the mean over the widths."""
        return {path: math.fsum(row.values()) / max(len(row), 1) for path, row in self.bits.items()}

    def relative(self) -> ProbeTable:
        """Errors as shares of the energy of the block's output (0 where that is 0); the energies are 1 then."""

        def shares(rows: Mapping[str, Mapping[Any, float]]) -> dict[str, dict[Any, float]]:
            return {
                path: {probe: error / (self.energy[path] or 1.0) for probe, error in row.items()}
                for path, row in rows.items()
            }

        return ProbeTable(shares(self.prune), shares(self.bits), self.samples, dict.fromkeys(self.energy, 1.0))


@torch.no_grad()
def compression_sensitivity(
    model: nn.Module,
    data: Calibration | Any,
    treat: TreatWeights,
    *,
    probes: Mapping[str, Sequence[float]] | None = None,
    layers: Sequence[LayerRef] | None = None,
    relative: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ProbeTable:
    """Mean squared error of each block's output, with one of its weights compressed at a time.

    For every block, every probe and every weight in the block, the block runs once more on the inputs that the intact
    model gives it; errors are averaged over the weights. Weights are pruned by magnitude and rounded to nearest, one
    symmetric scale for each output. Memory: one set of activations and one block's outputs; time: ``weights * probes``
    forwards of each block.

    Args:
        model: left as it is.
        data: calibration batches.
        treat: computes a compressed weight, such as `layerwright.treat.probe.treat_weights`.
        probes: ``{"prune": shares in [0, 1), "bits": widths in 2..8 or 16}``; see `PROBES`. Share 0 and 16 bits are
            the weight itself.
        layers: the weights to probe; by default all treatable ones in blocks.
        relative: errors over the mean square of the block's output (`ProbeTable.relative`). The paper and its released
            measurements take errors as they are, which grow with the residual stream: its last blocks weigh by far the
            most.
        progress: ``progress(blocks done, blocks)``.

    Raises:
        InputError: probes outside their ranges, no blocks, or outputs that are not finite (names the block).
    """
    chosen = _checked(PROBES if probes is None else probes)
    calibration = as_calibration(data)
    names = [name for stack in find_blocks(model) for name in stack.names]
    refs = [ref for ref in (treatable(model) if layers is None else layers) if ref.block is not None]
    inside = {name: [ref for ref in refs if ref.path == name or ref.path.startswith(name + ".")] for name in names}
    units = [name for name in names if inside[name]]
    if not units:
        raise InputError(f"{type(model).__name__} has no weights in blocks that could be probed")
    prune: dict[str, dict[float, float]] = {}
    bits: dict[str, dict[int, float]] = {}
    energy: dict[str, float] = {}
    with evaluating(model):
        for stop in Lockstep(model, units, forwards(model, calibration)):
            if stop.visit:
                continue
            energy[stop.path], errors = _probe_block(model, stop, inside[stop.path], chosen, treat)
            shares = [float(share) for share in probes_of(chosen, "prune")]
            prune[stop.path] = dict(zip(shares, errors[: len(shares)], strict=True))
            widths = [int(width) for width in probes_of(chosen, "bits")]
            bits[stop.path] = dict(zip(widths, errors[len(shares) :], strict=True))
            if progress:
                progress(len(prune), len(units))
    missing = [name for name in units if name not in prune]
    if missing:
        raise InputError(f"{missing[0]}: the calibration data never reached it; give data that runs every block")
    table = ProbeTable(prune, bits, calibration.samples, energy)
    return table.relative() if relative else table


def compression_probes(
    subject: Subject,
    kind: str = "prune",
    probes: Mapping[str, Sequence[float]] | None = None,
    relative: bool = False,
) -> Scores:
    """`compression_sensitivity` as scores of blocks: higher is more important.

    Args:
        subject: with `treat`.
        kind: ``prune`` or ``bits``: which probes the score is the mean of.
        probes, relative: see `compression_sensitivity`.

    Raises:
        InputError: another kind, or no `treat`.
    """
    if kind not in ("prune", "bits"):
        raise InputError(f"kind: got {kind!r}, expected 'prune' or 'bits'")
    if subject.treat is None:
        raise InputError("compression_probes computes treated weights: the subject needs treat=")
    table = compression_sensitivity(
        subject.model,
        subject.calibration,
        subject.treat,
        probes=probes,
        layers=subject.layers or None,
        relative=relative,
        progress=subject.progress,
    )
    found = table.prune_sensitivity if kind == "prune" else table.bits_sensitivity
    meta = {
        "kind": kind,
        "prune": _plain(table.prune),
        "bits": _plain(table.bits),
        "relative": relative,
        "loss_units": False,
    }
    return Scores("compression_probes", sensitivities=found, data=subject.calibration.fingerprint(), meta=meta)


def _plain(rows: Mapping[str, Mapping[Any, float]]) -> dict[str, dict[str, float]]:
    return {path: {f"{probe:g}": error for probe, error in row.items()} for path, row in rows.items()}


def probes_of(probes: Mapping[str, Sequence[float]], kind: str) -> Sequence[float]:
    """The probes of one kind, none where it is left out."""
    return tuple(probes.get(kind, ()))


def _checked(probes: Mapping[str, Sequence[float]]) -> Mapping[str, Sequence[float]]:
    for kind in probes:
        if kind not in ("prune", "bits"):
            raise unknown_name("kind", str(kind), ("prune", "bits"), "probes")
    bad = [share for share in probes_of(probes, "prune") if not 0 <= share < 1]
    if bad:
        raise InputError(f"probes: got the sparsity {bad[0]}, expected shares from 0 to below 1")
    odd = [width for width in probes_of(probes, "bits") if width not in (*range(2, 9), 16)]
    if odd:
        raise InputError(f"probes: got {odd[0]} bits, expected widths from 2 to 8, or 16")
    if not any(probes.values()):
        raise InputError("probes: got none, expected some of prune and bits")
    return probes


def _treatments(probes: Mapping[str, Sequence[float]]) -> list[Treatments]:
    pruned: list[Treatments] = [
        (Sparsify(share, method="magnitude"),) if share else () for share in probes_of(probes, "prune")
    ]
    rounded: list[Treatments] = [
        (Quantize(int(width), method="rtn"),) if width <= 8 else () for width in probes_of(probes, "bits")
    ]
    return pruned + rounded


def _probe_block(
    model: nn.Module,
    stop: Stop,
    refs: Sequence[LayerRef],
    probes: Mapping[str, Sequence[float]],
    treat: TreatWeights,
) -> tuple[float, list[float]]:
    """The mean square of the outputs, and one error for each probe, the mean over `refs`."""
    intact = [first_tensor(stop.run(call)).float() for call in stop.calls]
    if not all(bool(out.isfinite().all()) for out in intact):
        raise InputError(f"{stop.path}: its outputs hold NaN or infinity; check the calibration data")
    values = sum(out.numel() for out in intact)
    energy = sum(float(out.square().sum()) for out in intact) / values
    errors = []
    for treatments in _treatments(probes):
        total = 0.0
        for ref in refs if treatments else ():
            (weight,) = treat([read_matrix(model, ref)], [treatments], None)
            with _swapped(model, ref, weight):
                for call, out in zip(stop.calls, intact, strict=True):
                    total += float((first_tensor(stop.run(call)).float() - out).square().sum())
        errors.append(total / (values * len(refs)))
    return energy, errors


@contextmanager
def _swapped(model: nn.Module, ref: LayerRef, matrices: Tensor) -> Iterator[None]:
    """Context: the layer computes with `matrices` ``(count, out, in)``; the parameter itself is not written to."""
    owner, _, name = ref.parameter.rpartition(".")
    module = model.get_submodule(owner)
    old = get_parameter(model, ref.parameter)
    new = nn.Parameter(from_matrices(matrices.to(old.dtype), ref.layout, old.shape).contiguous(), requires_grad=False)
    kept = module._parameters[name]
    module._parameters[name] = new
    try:
        yield
    finally:
        module._parameters[name] = kept
