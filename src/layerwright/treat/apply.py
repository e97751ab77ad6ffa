"""Carry out a plan on a model in memory, block by block; the model that was given is left untouched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from layerwright.core.calibration import Calibration, as_calibration, evaluating
from layerwright.core.errors import InputError, PlanError, unknown_name
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers, structure_copy
from layerwright.core.lockstep import Lockstep
from layerwright.core.memory import peak_memory_bytes
from layerwright.core.plan import Plan
from layerwright.core.records import ApplyReport, LayerRecord
from layerwright.core.treatment import (
    Drop,
    KVBudget,
    RoundActivations,
    RoundAttention,
    RoundCache,
    Treatments,
    weight_treatments,
)
from layerwright.nn.kv import budget_cache_
from layerwright.nn.rounded_cache import round_cache_
from layerwright.nn.stored import Stored
from layerwright.score.inputs import UnitInputs, collect_inputs, forwards, units_of
from layerwright.treat.activations import round_activations_
from layerwright.treat.drop import drop_blocks
from layerwright.treat.narrow import add_widths, narrow_unit_, narrowed_parts
from layerwright.treat.prepare import prepare_
from layerwright.treat.unit import finish_unit, needs_inputs, treat_unit

__all__ = ["apply_plan"]

Progress = Callable[[str, int, int], None]
"""``progress(block path, done, total)``."""


def apply_plan(
    model: nn.Module,
    plan: Plan | Mapping[str, Treatments],
    calibration: Calibration | Iterable[object] | None = None,
    *,
    simulate: bool = False,
    progress: Progress | None = None,
) -> tuple[nn.Module, ApplyReport]:
    """Return a treated copy of `model` and the record of every layer.

    Each block's layers are treated with the inputs they get from the blocks before, which are treated already
    (Frantar et al., 2023); the calibration passes through each block twice. Memory: the model, the treated layers,
    one block's statistics, and one set of activations.

    Args:
        model: left untouched; the copy shares the tensors that no treatment changes.
        plan: a `Plan`, or treatments by layer path.
        calibration: needed by treatments that look at activations.
        simulate: keep treated weights as dense tensors (same results, no saving).
        progress: called after each block.

    Raises:
        PlanError: an unknown layer.
        InputError: a treatment that does not fit its layer, or activations that are not finite.
    """
    begun = time.perf_counter()
    layers = plan.layers if isinstance(plan, Plan) else plan
    layers = {path: treatments for path, treatments in layers.items() if treatments}
    report = ApplyReport()
    copy = structure_copy(model)
    steps, seed = (plan.prepare, plan.seed) if isinstance(plan, Plan) else ({}, 0)
    if steps:
        prepare_(copy, steps, None if calibration is None else as_calibration(calibration), seed=seed)
    known = {ref.path: ref for ref in list_layers(copy)}
    for path in layers:
        if path not in known:
            raise PlanError(str(unknown_name("layer", path, known, "the plan")))
    dropped = [path for path, treatments in layers.items() if any(isinstance(t, Drop) for t in treatments)]
    names: dict[str, str] = {path: path for path in known}
    if dropped:
        copy, block_map = drop_blocks(copy, dropped, copy=False)
        for path in dropped:
            report.add(LayerRecord(path, "drop", "done", "block dropped"))
        moved = {path: new for path in known if (new := block_map.new_path(path)) is not None}
        layers = {moved[path]: t for path, t in layers.items() if path in moved and path not in dropped}
        names = {new: path for path, new in moved.items()}
    everything = list_layers(copy)
    parts = narrowed_parts(copy, everything, layers)
    refs = [ref for ref in everything if weight_treatments(layers.get(ref.path, ()))]
    needs = {ref.path: needs_inputs(layers[ref.path]) for ref in refs}
    pending: list[tuple[LayerRef, Stored]] = []
    with torch.no_grad(), evaluating(copy):
        if any(needs.values()):
            if calibration is None:
                raise PlanError("this plan looks at activations: pass calibration data")
            data = as_calibration(calibration)
            units = units_of(copy, refs)
            walk = Lockstep(copy, list(units), forwards(copy, data))
            done: set[str] = set()
            for stop in walk:
                finish_unit(copy, pending, simulate=simulate)
                pending = []
                if stop.visit == 0:
                    inside = units[stop.path]
                    inputs = collect_inputs(copy, stop, inside, needs)
                    done |= {ref.path for ref in inside}
                    inside, widths = narrow_unit_(copy, inside, parts, layers, inputs, names=names)
                    pending = treat_unit(copy, inside, layers, inputs, report, names=names)
                    add_widths(report, widths)
                if progress:
                    progress(stop.path, len(done), len(refs))
            finish_unit(copy, pending, simulate=simulate)
            refs = [ref for ref in refs if ref.path not in done]
        refs, widths = narrow_unit_(copy, refs, parts, layers, UnitInputs(), names=names)
        rest = treat_unit(copy, refs, layers, UnitInputs(), report, names=names)
        add_widths(report, widths)
        finish_unit(copy, rest, simulate=simulate)
    _treat_caches_(copy, everything, layers, report, names)
    # Ranges of activations are those that follow rounded keys and values.
    if any(isinstance(t, RoundActivations | RoundAttention) for own in layers.values() for t in own):
        if calibration is None:
            raise PlanError("this plan rounds activations: pass calibration data")
        round_activations_(copy, everything, layers, as_calibration(calibration), seed=seed)
    report.seconds = time.perf_counter() - begun
    report.peak_memory_bytes = peak_memory_bytes()
    return copy, report


def _treat_caches_(
    model: nn.Module,
    refs: Iterable[LayerRef],
    layers: Mapping[str, Treatments],
    report: ApplyReport,
    names: Mapping[str, str],
) -> None:
    """Round what the planned attention modules hand to their caches, and limit the tokens they keep, in place."""
    kinds = {ref.path: ref.kind for ref in refs}
    budgets: dict[str, KVBudget] = {}
    for path, own in layers.items():
        for t in own:
            if not isinstance(t, RoundCache | KVBudget):
                continue
            if kinds[path] != "attention":
                raise InputError(f"{path}: {t.label()} is for attention modules, this is a {kinds[path]}")
            if isinstance(t, RoundCache):
                round_cache_(model, {path: t.bits})
            else:
                budgets[path] = t
            report.add(LayerRecord(names[path], t.label(), "done", "no calibration data needed"))
    if budgets:
        budget_cache_(model, budgets)
