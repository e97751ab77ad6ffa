"""Forecast peak memory, time and disk of applying a plan, from real shapes and a short measurement of this machine."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.core.forecast import Forecast
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers, saved_tensors
from layerwright.core.memory import resident_bytes
from layerwright.core.plan import Plan
from layerwright.core.storage import stored_bytes
from layerwright.score.costs import find_blocks_or_none
from layerwright.treat.unit import needs_inputs

__all__ = ["forecast_apply", "matmul_flops_per_second", "output_bytes"]

COLUMN_SECONDS_PER_ELEMENT = 2.2e-9
"""Seconds per weight of GPTQ's column loop and its range search, measured; small beside the matrix products."""


@cache
def matmul_flops_per_second(dtype: torch.dtype, rows: int = 1024, width: int = 512) -> float:
    """Floating-point operations per second of a linear layer here and now (a fifth of a second is spent on it)."""
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(width, width).to(dtype)
    nn.functional.linear(x, weight)
    runs, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < 0.2:
        nn.functional.linear(x, weight)
        runs += 1
    return 2 * rows * width * width * runs / (time.perf_counter() - begun)


def output_bytes(model: nn.Module, plan: Plan, refs: tuple[LayerRef, ...] | None = None) -> float:
    """Bytes of the saved tensors after `plan`, from shapes alone."""
    refs = refs or list_layers(model)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in saved_tensors(model)}
    dtypes = {name: tensor.element_size() for name, tensor in saved_tensors(model)}
    dropped = [path for path, t in plan.layers.items() if any(x.scope == "block" for x in t)]
    kept = {n: s for n, s in sizes.items() if not any(n.startswith(f"{path}.") for path in dropped)}
    total = float(sum(kept.values()))
    for ref in refs:
        treatments = plan.layers.get(ref.path, ())
        if treatments and ref.parameter in kept:
            width = dtypes[ref.parameter]
            total += stored_bytes(treatments, *ref.shape, ref.count, width) - kept[ref.parameter]
    return total


def forecast_apply(model: nn.Module, plan: Plan, calibration: Calibration | None, *, streamed: bool = True) -> Forecast:
    """What applying `plan` will take.

    Memory: what the process holds now, the layers outside blocks, one block as read and as treated with its input
    statistics and their factors, two copies of the activations and one batch's widest intermediate (the whole model
    and its treated layers when it is not streamed). Time: two forwards per block, one ``X^T X`` per distinct input,
    the factorizations and the column loops, at the speed of a matrix product measured here. Disk: the output and the
    saved activations.
    """
    refs = list_layers(model)
    weights = {ref.path: ref for ref in refs if ref.layout != "none"}
    sizes = {name: (t.numel() * t.element_size(), t.numel(), t.dtype) for name, t in saved_tensors(model)}
    blocks = [path for stack in find_blocks_or_none(model) for path in stack.names]
    inside = {path: sum(s for n, (s, _, _) in sizes.items() if n.startswith(f"{path}.")) for path in blocks}
    total = sum(s for s, _, _ in sizes.values())
    outside = total - sum(inside.values())
    largest = max(inside.values(), default=0)
    treated = [ref for path, ref in weights.items() if plan.layers.get(path)]
    grams = [ref for ref in treated if needs_inputs(plan.layers[ref.path]) == "gram"]
    rows, batch_rows = _rows(calibration)
    hidden = min((ref.shape[1] for ref in treated), default=0)
    widest = max((max(ref.shape) for ref in treated), default=0)
    width = max((dtype.itemsize for _, _, dtype in sizes.values()), default=4)
    dtype = next((d for _, _, d in sizes.values() if d.is_floating_point), torch.float32)
    statistics = _largest_statistics(grams, blocks)
    activations = 2 * rows * hidden * width
    working = 4 * batch_rows * widest * 4
    weights_in_memory = outside + 3 * largest if streamed else total + largest
    peak = resident_bytes() + weights_in_memory + (statistics + activations + working if grams else 0)
    return Forecast(
        peak_memory_bytes=float(peak),
        seconds=_seconds(weights, treated, grams, rows, dtype, total),
        disk_bytes=output_bytes(model, plan, refs) + (activations / 2 if streamed and grams else 0),
        output_bytes=output_bytes(model, plan, refs),
    )


def _rows(calibration: Calibration | None) -> tuple[int, int]:
    if calibration is None:
        return 0, 0
    counts = []
    for batch in calibration.batches:
        tensors = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else [batch]
        first = next(t for t in tensors if isinstance(t, Tensor))
        counts.append(first.numel() if not first.is_floating_point() else int(first.shape[0]) * 64)
    return sum(counts), max(counts)


def _largest_statistics(grams: list[LayerRef], blocks: list[str]) -> float:
    """Bytes of one block's input statistics, and of the factors of the largest."""
    found: dict[str, dict[tuple[int, int], int]] = {}
    for ref in grams:
        block = next((path for path in blocks if ref.path.startswith(f"{path}.")), ref.path)
        found.setdefault(block, {})[(ref.shape[1], ref.count)] = 4 * ref.count * ref.shape[1] ** 2
    most = max((sum(sizes.values()) for sizes in found.values()), default=0)
    factor = max((8 * ref.shape[1] ** 2 * 3 for ref in grams), default=0)
    return float(most + factor)


def _seconds(
    weights: dict[str, LayerRef],
    treated: list[LayerRef],
    grams: list[LayerRef],
    rows: int,
    dtype: torch.dtype,
    size: int,
) -> float:
    speed, plain = matmul_flops_per_second(dtype), matmul_flops_per_second(torch.float32)
    in_blocks = sum(ref.numel for ref in weights.values() if ref.block is not None)
    forward = 2.0 * 2 * in_blocks * rows / speed if grams else 0.0
    distinct = {(ref.path.rpartition(".")[0], ref.shape[1], ref.count): ref for ref in grams}
    moments = sum(rows * ref.shape[1] ** 2 for ref in distinct.values()) / plain
    factors = sum(2.0 * ref.count * ref.shape[1] ** 3 for ref in distinct.values()) / plain
    columns = sum(ref.numel for ref in treated) * COLUMN_SECONDS_PER_ELEMENT * 20
    updates = sum(2.0 * ref.numel * ref.shape[1] for ref in grams) / plain
    return forward + moments + factors + columns + updates + size / 5e8
