"""Everything that can be known before any weight is loaded, all problems together."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from layerwright.core.budget import Budget
from layerwright.core.calibration import Calibration
from layerwright.core.checkpoint import Checkpoint
from layerwright.core.errors import CheckError, InputError
from layerwright.core.forecast import Forecast
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers, saved_tensors, treatable
from layerwright.core.plan import Plan
from layerwright.core.recipe import Recipe
from layerwright.core.registry import Registry
from layerwright.core.storage import stored_bytes
from layerwright.core.target import Target
from layerwright.core.target import target as target_named
from layerwright.core.treatment import Treatments
from layerwright.data.loading import check_device, locate, torch_dtype
from layerwright.recipes.bench import read_data
from layerwright.recipes.book import default_recipe, recipe
from layerwright.recipes.feasible import refuse_unreachable, static_part
from layerwright.recipes.forecast import forecast_apply
from layerwright.recipes.job import protected_blocks
from layerwright.recipes.kv_rows import free_rows
from layerwright.recipes.needs import require
from layerwright.recipes.removable import removable
from layerwright.recipes.table import candidates_for
from layerwright.recipes.width import narrows
from layerwright.score.costs import find_blocks_or_none, profile_model
from layerwright.treat.narrow import FeedForward, feed_forwards
from layerwright.treat.stream import empty_model
from layerwright.treat.writer import check_folder

__all__ = ["check_job"]

_KNOWN = (ValueError, TypeError, OSError, ImportError)


def check_job(
    model: str | Path,
    budget: str,
    recipe_name: str | Path | None = None,
    *,
    target: str = "layerwright",
    data: str | Path | None = None,
    out: str | Path | None = None,
    samples: int = 128,
    length: int = 256,
    device: str = "cpu",
    dtype: str = "auto",
    force: bool = False,
) -> Forecast:
    """Check names, paths, headers, sizes, budget, data, disk and memory, and forecast the run.

    Raises:
        CheckError: every problem that was found, one line each.
    """
    begun = time.perf_counter()
    problems: list[str] = []

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except CheckError as error:
            problems.extend(error.problems)
        except _KNOWN as error:
            problems.append(str(error))
        return None

    limits = attempt(lambda: Budget.parse(budget))
    chosen = attempt(lambda: recipe(recipe_name) if recipe_name else default_recipe(limits) if limits else None)
    if chosen is not None:
        for registry, name in _parts(chosen):
            attempt(partial(registry.get, name))
    goal = attempt(lambda: target_named(target))
    attempt(lambda: torch_dtype(dtype))
    attempt(lambda: check_device(device))
    if out is not None:
        attempt(lambda: check_folder(out, force=force, resume=False))
    source = attempt(lambda: locate(model))
    if source is None:
        raise CheckError(problems)
    checkpoint = attempt(lambda: Checkpoint.open(source.folder))
    split = attempt(lambda: read_data(source, data, samples=samples, length=length))
    skeleton = attempt(lambda: empty_model(source.folder)) if checkpoint else None
    if skeleton is None or problems or limits is None or chosen is None or goal is None:
        raise CheckError(problems)
    if source.structure:
        raise CheckError([f"{source.name} is treated already: plan from the original model"])
    refs = treatable(skeleton, list_layers(skeleton))
    if not refs:
        raise CheckError([f"{source.name} has no layer that can be treated"])
    for need in chosen.needs:
        attempt(partial(require, need, skeleton, chosen.name))
    if goal.format in ("gguf", "compressed-tensors", "onnx"):
        attempt(lambda: _require_extra(goal.format))
    width = next(t.element_size() for n, t in saved_tensors(skeleton) if n == refs[0].parameter)
    parts = feed_forwards(skeleton) if narrows(chosen) else {}
    candidates = candidates_for(refs, chosen, goal, width, parts)
    if (
        not any(candidates.values()) and not chosen.drop_blocks and not chosen.decider
    ):  # without blocks `_reachable` refuses
        problems.append(f"recipe {chosen.name} has no treatment that {goal.name} loads and that fits {source.name}")
    smallest = {ref.path: _smallest(ref, candidates[ref.path], width) for ref in refs}
    attempt(lambda: _reachable(limits, skeleton, refs, candidates, chosen, goal, width, parts, split[0]))
    plan = Plan(layers={path: t for path, t in smallest.items() if t})
    forecast = forecast_apply(
        skeleton,
        plan,
        split[0],
        streamed=False,
        folder=source.folder,
        spent_seconds=time.perf_counter() - begun,
    )
    if out is not None:
        attempt(lambda: _room(Path(out), forecast.disk_bytes))
    if forecast.peak_memory_bytes > 1.2 * _memory():
        problems.append(
            f"this needs about {forecast.peak_memory_bytes / 1e9:.1f} GB of memory and the machine has "
            f"{_memory() / 1e9:.1f} GB: plan on a larger one, or apply a plan with `layerwright apply`, which streams"
        )
    if problems:
        raise CheckError(problems)
    return forecast


def _parts(chosen: Recipe) -> list[tuple[Registry[Any], str]]:
    """What a recipe names, and where it must be known."""
    import layerwright.score  # noqa: F401 - fills the registry of scorers
    from layerwright.allocate import ALLOCATORS
    from layerwright.score.base import SCORERS
    from layerwright.tune import TUNERS

    tuner = [(TUNERS, chosen.tuner)] if chosen.tuner else []
    dropping = [(SCORERS, chosen.drop_scorer)] if chosen.drop_blocks else []
    return [(SCORERS, chosen.scorer), (ALLOCATORS, chosen.allocator), *dropping, *tuner]


def _smallest(ref: LayerRef, options: Sequence[Treatments], width: int) -> Treatments:
    return min(options, key=lambda treatments: _size(ref, treatments, width), default=())


def _size(ref: LayerRef, treatments: Treatments, width: int) -> int:
    return stored_bytes(treatments, *ref.shape, ref.count, width)


def _require_extra(form: str) -> None:
    from layerwright.core.errors import require_extra

    require_extra({"gguf": "gguf", "compressed-tensors": "compressed_tensors", "onnx": "onnxscript"}[form], "export")


def _reachable(
    limits: Budget,
    model: Any,
    refs: tuple[LayerRef, ...],
    candidates: dict[str, tuple[Treatments, ...]],
    chosen: Recipe,
    goal: Target,
    width: int,
    parts: Mapping[str, FeedForward],
    data: Calibration,
) -> None:
    """Refuse a budget that the shapes alone show to be out of reach, dropped blocks included."""
    blocks = find_blocks_or_none(model)
    profile = profile_model(model, timing=False)
    refuse_unreachable(
        static_part(limits),
        profile,
        refs,
        candidates,
        chosen,
        goal,
        element_bytes=width,
        blocks=blocks,
        settings=protected_blocks(chosen.allocator_settings, sum(len(stack) for stack in blocks)),
        parts=parts,
        cache=free_rows(model, data, profile, limits, goal, chosen.cache_shares),
        free=removable(model, blocks) if chosen.drop_blocks else None,
    )


def _room(out: Path, needed: float) -> None:
    folder = next(path for path in [out, *out.absolute().parents] if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{out} has {free / 1e6:,.0f} MB free, and the output takes {needed / 1e6:,.0f} MB")


def _memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
