"""One block at a time: measure its layers' inputs, treat its layers, hand the treated modules over."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from layerwright.core.layer import LayerRef, from_matrices, get_parameter, read_matrix
from layerwright.core.records import ApplyReport, LayerRecord, Reason
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import Treatments, describe, weight_treatments
from layerwright.nn.replace import replace_
from layerwright.nn.stored import Stored
from layerwright.score.inputs import UnitInputs
from layerwright.score.statistics import InputStatistics
from layerwright.treat.checks import needed_statistics
from layerwright.treat.compute import relative_error, treated_group
from layerwright.treat.factorize import ConvChain, chosen_factor, factor_conv_, place_chain_

__all__ = ["finish_unit", "needs_inputs", "treat_unit"]


def needs_inputs(treatments: Treatments) -> str:
    """What `treatments` must know of a layer's input: ``""``, ``"diagonal"`` or ``"gram"``."""
    need = needed_statistics(treatments)
    return "" if need == "none" else need


def treat_unit(
    model: nn.Module,
    refs: Sequence[LayerRef],
    plan: Mapping[str, Treatments],
    inputs: UnitInputs,
    report: ApplyReport,
    *,
    names: Mapping[str, str] | None = None,
) -> list[tuple[LayerRef, Stored]]:
    """Treat `refs` and put their treated weights in place as dense tensors, so that the block runs at full speed.

    Each layer's parameter is replaced, never written to. `finish_unit` turns them into packed modules.

    Args:
        plan: treatments by layer path (in `model`).
        names: path in `model` to the path that reports use, where blocks were dropped.
    """
    finished: list[tuple[LayerRef, Stored]] = []
    matrices = []
    for ref in refs:
        if chosen_factor(plan.get(ref.path, ())) is None:
            matrices.append(ref)
            continue
        chain, record = factor_conv_(model, ref, plan[ref.path], name=(names or {}).get(ref.path, ref.path))
        report.add(record)
        finished.append((ref, chain))
    for group in inputs.groups([ref for ref in matrices if weight_treatments(plan.get(ref.path, ()))]):
        statistics = inputs.of.get(group[0].path)
        weights = [read_matrix(model, ref) for ref in group]
        begun = time.perf_counter()
        results = treated_group(
            weights,
            [plan[ref.path] for ref in group],
            statistics,
            scale_dtype=weights[0].dtype,
            names=[ref.path for ref in group],
        )
        seconds = (time.perf_counter() - begun) / len(group)
        for ref, weight, (stored, notes) in zip(group, weights, results, strict=True):
            error = relative_error(weight, stored, statistics)
            report.add(
                LayerRecord(
                    layer=(names or {}).get(ref.path, ref.path),
                    treatment=describe(plan[ref.path]),
                    status="failed" if any("rounded to nearest" in note for note in notes) else "done",
                    reason=_reason(plan[ref.path], statistics, notes),
                    error=error,
                    tokens=int(statistics.total_tokens) if statistics is not None else 0,
                    bytes=stored_bytes(plan[ref.path], *ref.shape, ref.count, weight.element_size()),
                    seconds=seconds,
                    note="; ".join(notes),
                )
            )
            _place_dense(model, ref, stored)
            finished.append((ref, stored))
    return finished


def _reason(treatments: Treatments, statistics: InputStatistics | None, notes: Sequence[str]) -> Reason:
    text = " ".join(notes)
    if "rounded to nearest" in text:
        return "factorization failed, rounded to nearest"
    if "damp" in text:
        return "factorization damped"
    if statistics is None:
        return "never reached by the calibration data" if needs_inputs(treatments) else "no calibration data needed"
    return "some experts saw no tokens" if "expert" in text else "as planned"


def _place_dense(model: nn.Module, ref: LayerRef, stored: Stored) -> None:
    old = get_parameter(model, ref.parameter)
    dense = from_matrices(stored.to_dense(old.dtype), ref.layout, old.shape).contiguous()
    owner, _, name = ref.parameter.rpartition(".")
    module = model.get_submodule(owner) if owner else model
    module._parameters[name] = nn.Parameter(dense.to(old.device), requires_grad=False)


def finish_unit(model: nn.Module, finished: Sequence[tuple[LayerRef, Stored]], *, simulate: bool = False) -> None:
    """Put the packed modules in place of the dense weights; with `simulate` the dense weights stay."""
    if simulate:
        return
    with torch.no_grad():
        for ref, stored in finished:
            if isinstance(stored, ConvChain):
                place_chain_(model, ref, stored)
            else:
                replace_(model, ref, stored)
