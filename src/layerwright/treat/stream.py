"""Carry out a plan on a checkpoint that may be larger than memory, one block at a time, and survive a kill."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration
from layerwright.core.checkpoint import Checkpoint, build_empty, model_config
from layerwright.core.errors import CheckpointError, InputError
from layerwright.core.fingerprint import fingerprint_tensors
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers, saved_tensors
from layerwright.core.lockstep import Lockstep
from layerwright.core.memory import peak_memory_bytes
from layerwright.core.plan import Plan
from layerwright.core.records import ApplyReport, LayerRecord
from layerwright.core.treatment import Drop, Treatments
from layerwright.score.inputs import UnitInputs, collect_inputs, forwards, units_of
from layerwright.treat._resume import finished_count, open_progress, read_state, run_key, write_state
from layerwright.treat._shards import ShardRun, load_outside, refuse_nan, write_rest
from layerwright.treat.drop import drop_blocks
from layerwright.treat.unit import finish_unit, needs_inputs, treat_unit
from layerwright.treat.writer import PROGRESS, CheckpointWriter, copy_side_files, prepare_folder

__all__ = ["apply_checkpoint", "checkpoint_names", "empty_model", "fingerprint_checkpoint", "streams"]

Progress = Callable[[str, int, int], None]


def streams(folder: Path) -> str:
    """Why the checkpoint in `folder` cannot be treated block by block from its files; ``""`` if it can."""
    checkpoint, model = Checkpoint.open(folder), empty_model(folder)
    try:
        find_blocks(model)
        checkpoint_names(model, checkpoint)
    except CheckpointError as error:
        return str(error)
    except InputError:
        return "it has no repeated blocks"
    return ""


def fingerprint_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> str:
    """`fingerprint_model` of the model whose weights lie in `checkpoint`, reading one tensor at a time.

    Raises:
        CheckpointError: as `checkpoint_names`.
        NotFiniteError: a weight is NaN or infinite.
    """
    names = checkpoint_names(model, checkpoint)
    dtypes = {name: tensor.dtype for name, tensor in saved_tensors(model)}
    ordered = sorted(dtypes)

    def pairs() -> Iterator[tuple[str, Tensor]]:
        for name in ordered:
            tensor = next(checkpoint.read([names[name]]))[1]
            refuse_nan(checkpoint.folder, {names[name]: tensor})
            yield name, tensor.to(dtypes[name])

    return fingerprint_tensors(pairs())


def checkpoint_names(model: nn.Module, checkpoint: Checkpoint, old: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name in the model to name in the files, for every tensor that is saved.

    Raises:
        CheckpointError: the files name or shape their tensors differently from the model (they are converted when
            they are loaded whole).
    """
    prefixes = ("", f"{getattr(model, 'base_model_prefix', '')}.")
    names: dict[str, str] = {}
    tied = _tied(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        wanted = (old or {}).get(name, name)
        options = [wanted, *(wanted.removeprefix(p) for p in prefixes if p), *(p + wanted for p in prefixes if p)]
        found = next((option for option in options if option in checkpoint.files), None)
        if found is None:
            if name in tied:
                continue
            raise CheckpointError(f"{checkpoint.folder} has no tensor {wanted}: its names are converted on loading")
        if checkpoint.shapes[found] != tuple(tensor.shape):
            raise CheckpointError(f"{checkpoint.folder}: {found} has another shape than the model's {name}")
        names[name] = found
    return names


def _tied(model: nn.Module) -> set[str]:
    first: dict[int, str] = {}
    extra: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            extra.add(name)
        first.setdefault(id(tensor), name)
    return extra


def empty_model(folder: Path) -> nn.Module:
    """The model in `folder`, its weights on the meta device."""
    config = model_config(folder)
    dtype = getattr(config, "dtype", None)
    return build_empty(config, dtype if isinstance(dtype, torch.dtype) else None)


def apply_checkpoint(
    folder: str | Path,
    plan: Plan,
    calibration: Calibration | None,
    out: str | Path,
    *,
    progress: Progress | None = None,
    force: bool = False,
    name: str = "",
) -> ApplyReport:
    """Treat the checkpoint in `folder` according to `plan` and write the result to `out`.

    One block is in memory at a time: it is read, treated with the inputs that the blocks before gave it, written as a
    shard and freed. After each block the activations that stand before the next one are saved too, so that a killed
    run goes on from there, with the same values, to the byte-identical result.

    Peak memory: the layers outside blocks, one block (as read, treated, and packed), its input statistics, and two
    copies of the activations; independent of depth.

    Raises:
        CheckpointError: the files do not match the model's names (load the model whole instead), or cannot be written.
    """
    begun = time.perf_counter()
    folder = Path(folder)
    checkpoint = Checkpoint.open(folder)
    model = empty_model(folder)
    layers = {path: treatments for path, treatments in plan.layers.items() if treatments}
    dropped = [path for path, t in layers.items() if any(isinstance(x, Drop) for x in t)]
    original = {ref.path for ref in list_layers(model)}
    new_of = {path: path for path in original}
    old_names: dict[str, str] = {}
    checkpoint_names(model, checkpoint)
    if dropped:
        before = list(model.state_dict(keep_vars=True))
        model, block_map = drop_blocks(model, dropped, copy=False)
        new_of = {path: block_map.new_path(path) or "" for path in original}
        old_names = {new: name for name in before if (new := block_map.new_path(name))}
        layers = {new_of[path]: t for path, t in layers.items() if path not in dropped}
    names = checkpoint_names(model, checkpoint, old_names)
    target = prepare_folder(out, force=force)
    state_folder = target / PROGRESS
    key = run_key(plan, checkpoint, calibration)
    open_progress(state_folder, key, target, force=force)
    report = ApplyReport.load(state_folder / "apply.jsonl")
    report.path = state_folder / "apply.jsonl"
    if not report.records:
        for path in dropped:
            report.add(LayerRecord(path, "drop", "done", "block dropped"))
    run = ShardRun(model, checkpoint, names, CheckpointWriter(target), state_folder, {}, [])
    refs = [ref for ref in list_layers(model) if layers.get(ref.path)]
    reported = {new: old for old, new in new_of.items() if new}
    try:
        with torch.no_grad():
            _walk(run, refs, layers, calibration, report, reported, progress)
            write_rest(run)
    except Exception:
        if not run.shards:  # nothing is finished that a second run could take up
            shutil.rmtree(state_folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                target.rmdir()
        raise
    settings: Any = model.config
    config = settings.to_dict() | {"architectures": [type(model).__name__]}
    run.writer.finish(config, run.structure, {"plan": "plan.yaml"})
    copy_side_files(folder, target)
    plan.save(target / "plan.yaml")
    report.save(target / "apply.jsonl")
    shutil.rmtree(state_folder)
    report.seconds = time.perf_counter() - begun
    report.peak_memory_bytes = peak_memory_bytes()
    return report


def _walk(
    run: ShardRun,
    refs: Sequence[LayerRef],
    layers: Mapping[str, Treatments],
    calibration: Calibration | None,
    report: ApplyReport,
    reported: Mapping[str, str],
    progress: Progress | None,
) -> None:
    """Visit every block in order; afterwards only what stands outside the blocks is left in memory."""
    blocks = [name for stack in find_blocks(run.model) for name in stack.names]
    units = units_of(run.model, refs)
    outside = {path: inside for path, inside in units.items() if path not in blocks}
    needs = {ref.path: needs_inputs(layers[ref.path]) for ref in refs}
    data_free = not any(needs.values()) or calibration is None
    done = run.restore(finished_count(run.progress, "model") if data_free else finished_count(run.progress, "state"))
    if done:
        report.resumed_at = f"after {done[-1]}"
    if calibration is None or data_free:
        for number, path in enumerate(blocks):
            if path not in done:
                run.load(path)
                finish_unit(
                    run.model, treat_unit(run.model, units.get(path, []), layers, UnitInputs(), report, names=reported)
                )
                run.write(path)
            if progress:
                progress(path, number + 1, len(blocks))
        load_outside(run, blocks)
        rest = [ref for inside in outside.values() for ref in inside]
        finish_unit(run.model, treat_unit(run.model, rest, layers, UnitInputs(), report, names=reported))
        return
    load_outside(run, blocks)
    for path in done:
        run.model.get_submodule(path).to("meta")
    resume = read_state(run.progress, len(done))
    visited = set(done)
    walk = Lockstep(run.model, [*blocks, *outside], forwards(run.model, calibration), keep_history=True, resume=resume)
    pending: list[Any] = []
    standing = ""
    for stop in walk:
        if standing:
            finish_unit(run.model, pending)
            run.write(standing)
            write_state(run.progress, len(run.shards), walk)
            visited.add(standing)
        pending, standing = [], stop.path
        if stop.path in blocks:
            if stop.path in visited:
                raise CheckpointError(
                    f"{stop.path} runs twice in one pass: load the model whole instead of streaming it"
                )
            run.load(stop.path)
        if stop.visit == 0:
            inside = units.get(stop.path, [])
            pending = treat_unit(
                run.model, inside, layers, collect_inputs(run.model, stop, inside, needs), report, names=reported
            )
        if progress:
            progress(stop.path, len(visited) + 1, len(blocks) + len(outside))
    finish_unit(run.model, pending)
    if standing:
        run.write(standing)
    visited.add(standing)
    for path in blocks:
        if path not in visited:  # never reached by the data: treated without it
            run.load(path)
            finish_unit(
                run.model, treat_unit(run.model, units.get(path, []), layers, UnitInputs(), report, names=reported)
            )
            run.write(path)
    missed = [ref for path, inside in outside.items() if path not in visited for ref in inside]
    finish_unit(run.model, treat_unit(run.model, missed, layers, UnitInputs(), report, names=reported))
