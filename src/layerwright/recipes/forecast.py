"""Forecast peak memory, time and disk of applying a plan, from real shapes and short measurements of this machine."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.core.forecast import Forecast
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers, saved_tensors
from layerwright.core.memory import peak_memory_bytes, release_free_memory, resident_bytes
from layerwright.core.plan import Plan
from layerwright.core.storage import stored_bytes
from layerwright.recipes.duration import apply_seconds, count_work, hidden_size
from layerwright.score.costs import find_blocks_or_none
from layerwright.treat.unit import needs_inputs

__all__ = ["forecast_apply", "output_bytes"]

NOTES_BYTES = {"layer": 1_300, "tensor": 180, "folder": 1_500}
"""What the description, the plan, the report and the headers of a checkpoint take for each treated layer, each saved
tensor, and besides."""


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


def forecast_apply(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration | None,
    *,
    streamed: bool = True,
    folder: Path | None = None,
    spent_seconds: float = 0.0,
) -> Forecast:
    """What applying `plan` will take, start and end of the process included.

    Memory: what the process has held at most until now, or holds now with the layers outside blocks, one block as read and as treated with its input
    statistics and their factors, two copies of the activations and one batch's widest intermediate (the whole model
    and its treated layers when it is not streamed). Time: two forwards per block (the first up to its last treated
    layer), one ``X^T X`` per distinct input, the treatment of each layer, reading and writing, and what is done once
    a block and once a layer, each at the speed that a probe of some hundredths of a second finds here and now. Disk:
    at the end the output and the files beside it; while it runs the activations before the next block too, twice
    while new ones replace old ones.

    Args:
        model: on any device; only shapes are read.
        plan: what to apply.
        calibration: the data, if there is any.
        streamed: block by block from the files.
        folder: of the model; its tokenizer and the like are copied.
        spent_seconds: what the run took until now, or will take before it begins.
    """
    begun = time.perf_counter()
    refs = list_layers(model)
    weights = {ref.path: ref for ref in refs if ref.layout != "none"}
    sizes = {name: (t.numel() * t.element_size(), t.numel(), t.dtype) for name, t in saved_tensors(model)}
    blocks = [path for stack in find_blocks_or_none(model) for path in stack.names]
    inside = {path: sum(s for n, (s, _, _) in sizes.items() if n.startswith(f"{path}.")) for path in blocks}
    total = sum(s for s, _, _ in sizes.values())
    outside = total - sum(inside.values())
    largest = max(inside.values(), default=0)
    treated = [ref for path, ref in weights.items() if plan.layers.get(path)]
    watched = [ref for ref in treated if needs_inputs(plan.layers[ref.path])]
    grams = [ref for ref in watched if needs_inputs(plan.layers[ref.path]) == "gram"]
    rows, batch_rows, length = _rows(calibration)
    widest = max((max(ref.shape) for ref in treated), default=0)
    width = max((dtype.itemsize for _, _, dtype in sizes.values()), default=4)
    activations = rows * hidden_size(model, treated) * width
    working = 4 * batch_rows * widest * 4
    weights_in_memory = outside + 3 * largest if streamed else total + largest
    passing = _largest_statistics(grams, blocks) + 2 * activations + working if watched else 0
    output = output_bytes(model, plan, refs)
    # The last block's weights stand beside the activations of all: nothing is deleted before the whole is written.
    state = float(activations) if streamed and watched else 0.0
    finished = output + _notes_bytes(len(treated), len(sizes), folder)
    work = count_work(
        model,
        plan,
        weights,
        rows=rows,
        length=length,
        blocks=len(blocks) if streamed else 0,
        read=float(total),
        written=output,
        state=state,
    )
    seconds = apply_seconds(model, plan, weights, work, batch_rows)
    release_free_memory()  # what the probes took
    peak = max(float(peak_memory_bytes()), float(resident_bytes() + weights_in_memory + passing))
    return Forecast(
        peak_memory_bytes=peak,
        seconds=spent_seconds + seconds + time.perf_counter() - begun,
        disk_bytes=max(finished + state, finished - outside + 2 * state),
        output_bytes=output,
        finished_bytes=finished,
    )


def _notes_bytes(layers: int, tensors: int, folder: Path | None) -> float:
    """Files beside the tensors: descriptions, headers, and what is copied from the model's folder."""
    copied = 0
    if folder is not None:
        weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
        copied = sum(p.stat().st_size for p in folder.iterdir() if p.is_file() and not p.name.endswith(weights))
    notes = NOTES_BYTES["layer"] * layers + NOTES_BYTES["tensor"] * (tensors + 2 * layers) + NOTES_BYTES["folder"]
    return float(copied + notes)


def _rows(calibration: Calibration | None) -> tuple[int, int, int]:
    """Tokens of all batches, of the largest batch, and of one sample."""
    if calibration is None:
        return 0, 0, 1
    counts, length = [], 1
    for batch in calibration.batches:
        tensors = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else [batch]
        first = next(t for t in tensors if isinstance(t, Tensor))
        if first.is_floating_point():
            counts.append(int(first.shape[0]) * 64)
        else:
            counts.append(first.numel())
            length = max(length, int(first.shape[-1]))
    return sum(counts), max(counts), length


def _largest_statistics(grams: list[LayerRef], blocks: list[str]) -> float:
    """Bytes of one block's input statistics, and of the factors of the largest."""
    found: dict[str, dict[tuple[int, int], int]] = {}
    for ref in grams:
        block = next((path for path in blocks if ref.path.startswith(f"{path}.")), ref.path)
        found.setdefault(block, {})[(ref.shape[1], ref.count)] = 4 * ref.count * ref.shape[1] ** 2
    most = max((sum(sizes.values()) for sizes in found.values()), default=0)
    factor = max((8 * ref.shape[1] ** 2 * 3 for ref in grams), default=0)
    return float(most + factor)
