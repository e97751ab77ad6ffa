"""How long applying a plan takes: what there is to do, counted from shapes, at the speed of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerwright.core.layer import LayerRef
from layerwright.core.plan import Plan
from layerwright.core.treatment import Quantize
from layerwright.recipes.speed import Speed, machine_speed, treatment_kind, treatment_speed
from layerwright.treat.unit import needs_inputs

__all__ = ["Work", "apply_seconds", "count_work", "hidden_size"]

HIDDEN_PASSES = 30
"""Times that a block's elementwise operations (norms, rotary embedding, residuals, copies) go over the hidden state."""

INNER_PASSES = 4
"""Times that they go over the values inside the feed-forward layers."""

STATISTICS_PASSES = 5
"""Times that gathering statistics goes over an input, besides the product."""


@dataclass(frozen=True)
class Work:
    """What applying a plan has to do, in operations.

    Attributes:
        products: floating-point operations of all forwards: two of each block, the first up to its last wanted input.
        values: values that elementwise operations of the forwards and the statistics go over.
        moments: multiply-adds of ``X^T X``, the whole square counted.
        read, written: bytes of the checkpoint, the output, and the activations between blocks.
        blocks, layers: that are visited and treated.
    """

    products: float
    values: float
    moments: float
    read: float
    written: float
    blocks: int
    layers: int


def hidden_size(model: nn.Module, refs: Sequence[LayerRef]) -> int:
    """Width of what passes between blocks: the configuration's, or the narrowest input of a block's layer."""
    config: Any = getattr(model, "config", None)
    size = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    inside = [ref.shape[1] for ref in refs if ref.block is not None] or [ref.shape[1] for ref in refs]
    return int(size) if isinstance(size, int) else min(inside, default=1)


def count_work(
    model: nn.Module,
    plan: Plan,
    weights: Mapping[str, LayerRef],
    *,
    rows: int,
    length: int,
    blocks: int,
    read: float,
    written: float,
    state: float,
) -> Work:
    """Count the work of applying `plan`.

    Args:
        model: on any device; its shapes are read.
        weights: its layers that hold a weight, by path.
        rows: tokens of all batches; 0 without data.
        length: tokens that see each other (of one sample).
        blocks: number of blocks.
        read, written: bytes of the checkpoint and of the output.
        state: bytes of the activations that are saved after each block; 0 where they are not.
    """
    treated = [ref for path, ref in weights.items() if plan.layers.get(path)]
    watched = [ref for ref in treated if needs_inputs(plan.layers[ref.path])]
    inside = [ref for ref in weights.values() if ref.block is not None]
    if not watched or not rows:
        return Work(0.0, 0.0, 0.0, read, written, blocks, len(treated))
    hidden = hidden_size(model, inside)
    seen = {ref.path: rows * _active(model, ref) for ref in inside}
    forward = sum(2.0 * ref.shape[0] * ref.shape[1] * seen[ref.path] for ref in inside)
    last = {ref.path.rpartition(".")[0]: ref for ref in inside if ref in watched and ref.role == "down"}
    spared = sum(2.0 * ref.shape[0] * ref.shape[1] * seen[ref.path] for ref in last.values())
    attention = 4.0 * rows * length * hidden * blocks if any(ref.role in ("k", "qkv") for ref in inside) else 0.0
    values = rows * (HIDDEN_PASSES * hidden * blocks + INNER_PASSES * _inner(inside))
    grams = {_input(ref): ref for ref in watched if needs_inputs(plan.layers[ref.path]) == "gram"}
    diagonals = {_input(ref): ref for ref in watched}
    return Work(
        products=2 * (forward + attention) - spared,
        values=2.0 * values + STATISTICS_PASSES * rows * sum(ref.shape[1] for ref in diagonals.values()),
        moments=sum(seen.get(ref.path, rows) * float(ref.shape[1]) ** 2 for ref in grams.values()),
        read=read,
        written=written + state * blocks,
        blocks=blocks,
        layers=len(treated),
    )


def apply_seconds(model: nn.Module, plan: Plan, weights: Mapping[str, LayerRef], work: Work, batch_rows: int) -> float:
    """Seconds of `work` and of the treatments of `plan`, measured on this machine in about a second."""
    inside = [ref for ref in weights.values() if ref.block is not None] or list(weights.values())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    hidden = hidden_size(model, inside)
    widest = max((max(ref.shape) for ref in inside), default=hidden)
    speed = machine_speed(dtype, hidden, widest, batch_rows or 64)
    return _moving(work, speed) + _treating(plan, weights)


def _moving(work: Work, speed: Speed) -> float:
    return (
        work.products / speed.products
        + work.values / speed.values
        + work.moments / speed.moments
        + work.read / speed.read
        + work.written / speed.written
        + work.blocks * speed.collection
        + work.layers * speed.record
    )


def _treating(plan: Plan, weights: Mapping[str, LayerRef]) -> float:
    """Layers that read one input and are quantized alike go through the columns together."""
    total = 0.0
    together: dict[Any, list[LayerRef]] = {}
    for path, ref in weights.items():
        treatments = plan.layers.get(path)
        if treatments and not any(t.scope == "block" for t in treatments):
            alike = len(treatments) == 1 and isinstance(treatments[0], Quantize)
            key = (_input(ref), treatments) if alike and needs_inputs(treatments) == "gram" else path
            together.setdefault(key, []).append(ref)
    for refs in together.values():
        kind = treatment_kind(plan.layers[refs[0].path])
        out = sum(ref.shape[0] for ref in refs)
        total += refs[0].count * treatment_speed(kind).seconds(out, refs[0].shape[1])
    return total


def _input(ref: LayerRef) -> tuple[str, int, int, str]:
    """Layers with the same are taken to read the same tensor: those of one module, of one width."""
    return ref.path.rpartition(".")[0], ref.shape[1], ref.count, "o" if ref.role in ("o", "down") else ""


def _inner(inside: Sequence[LayerRef]) -> int:
    return sum(ref.shape[1] for ref in inside if ref.role == "down")


def _active(model: nn.Module, ref: LayerRef) -> float:
    """Share of the tokens that one matrix of a stack of experts sees, times their number."""
    if ref.count == 1:
        return 1.0
    config: Any = getattr(model, "config", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return float(chosen) if isinstance(chosen, int) else 1.0
