"""The stages of the main job: scores, table, plan. Each takes and returns values that can be saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import layerwright.score  # noqa: F401 - fills the registry of scorers
from layerwright.allocate import ALLOCATORS, filter_target, merge_ties
from layerwright.core.blocks import Blocks
from layerwright.core.budget import Budget
from layerwright.core.cost import Cost
from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef, get_parameter
from layerwright.core.layers import list_layers, structure_copy, treatable
from layerwright.core.option import Allocation, Option, OptionTable, Scores
from layerwright.core.plan import Plan
from layerwright.core.profile import Profile
from layerwright.core.recipe import Recipe
from layerwright.core.target import Target, target
from layerwright.core.treatment import Quantize, Treatments
from layerwright.recipes.attention_sites import with_attention_bits
from layerwright.recipes.bench import Bench
from layerwright.recipes.book import default_recipe, recipe
from layerwright.recipes.decided import range_bytes, run_decider
from layerwright.recipes.deciders import Task
from layerwright.recipes.feasible import refuse_unreachable
from layerwright.recipes.kv_rows import free_rows, measured_rows, with_rows
from layerwright.recipes.needs import require
from layerwright.recipes.prepared import prepared_limits, prepared_profile
from layerwright.recipes.removable import COUNTS_PLACES, leave_one, refuse_empty, removable
from layerwright.recipes.settle import choose_by_measuring
from layerwright.recipes.table import (
    candidates_for,
    fused_groups,
    option_table,
    uniform_bytes,
)
from layerwright.recipes.timing import measured_times
from layerwright.recipes.width import narrows
from layerwright.score.base import SCORERS, Subject
from layerwright.score.costs import find_blocks_or_none, profile_model
from layerwright.treat.narrow import feed_forwards
from layerwright.treat.prepare import prepare_
from layerwright.treat.probe import treat_weights

__all__ = [
    "Decision",
    "decide",
    "element_bytes",
    "measure_scores",
    "plan_model",
    "protected_blocks",
    "removal_damages",
    "uniform_layers",
]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Decision:
    """Everything a plan came from."""

    plan: Plan
    allocation: Allocation
    table: OptionTable
    profile: Profile
    refs: tuple[LayerRef, ...]
    limits: Mapping[str, float]
    recipe: Recipe
    target: Target
    scores: Mapping[str, Scores] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def element_bytes(bench: Bench, refs: tuple[LayerRef, ...]) -> int:
    """Bytes of one untreated weight."""
    return get_parameter(bench.model, refs[0].parameter).element_size()


def measure_scores(
    bench: Bench,
    chosen: Recipe,
    candidates: Mapping[str, tuple[Treatments, ...]],
    refs: tuple[LayerRef, ...],
    blocks: tuple[Blocks, ...] = (),
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
    fingerprint: str = "",
) -> dict[str, Scores]:
    """The recipe's scores, read from `folder` where they fit model, data and candidates, measured and saved otherwise."""
    data = bench.calibration.head(chosen.score_samples)
    found: dict[str, Scores] = {}
    wanted = {"layers": (chosen.scorer, chosen.scorer_settings)} if any(candidates.values()) else {}
    if chosen.drop_blocks and blocks:
        wanted["blocks"] = (chosen.drop_scorer, {})
    for purpose, (name, settings) in wanted.items():
        saved = _saved(folder, name, fingerprint, data.fingerprint(), candidates if purpose == "layers" else None)
        if saved is not None:
            found[purpose] = saved
            continue
        subject = Subject(
            model=bench.model,
            calibration=data,
            layers=refs,
            candidates=candidates,
            blocks=removable(bench.model, blocks) if purpose == "blocks" else (),
            treat=treat_weights,
            seed=seed,
            progress=None if progress is None else partial(progress, f"scoring: {name}"),
        )
        found[purpose] = SCORERS.get(name)(subject, **settings)
        if folder is not None:
            found[purpose].save(folder)
    return found


def _saved(
    folder: Path | None,
    name: str,
    model: str,
    data: str,
    candidates: Mapping[str, tuple[Treatments, ...]] | None,
) -> Scores | None:
    path = folder / f"{name}.json" if folder is not None else None
    if path is None or not path.is_file():
        return None
    scores = Scores.load(path)
    if scores.model != model:
        raise InputError(f"{path} was measured on another model (fingerprint {scores.model}, this one is {model})")
    if scores.data != data:
        return None
    complete = candidates is None or all((p, t) in scores.damages for p, options in candidates.items() for t in options)
    return scores if complete else None


def decide(
    bench: Bench,
    budget: str | Budget,
    chosen: str | Path | Recipe | None = None,
    *,
    to: str | Target = "layerwright",
    seed: int = 0,
    scores_folder: Path | None = None,
    progress: Progress | None = None,
    layers: tuple[LayerRef, ...] | None = None,
) -> Decision:
    """Profile, score and allocate: everything up to the plan."""
    limits = Budget.parse(budget)
    the_recipe = default_recipe(limits) if chosen is None else recipe(chosen)
    the_target = target(to)
    for need in the_recipe.needs:
        require(need, bench.model, the_recipe.name)
    all_refs = list_layers(bench.model)
    refs = tuple(layers if layers is not None else treatable(bench.model, all_refs))
    if not refs:
        raise InputError(f"{bench.name} has no layer that can be treated")
    width = element_bytes(bench, refs)
    timing = any(limit.resource == "ms" for limit in limits)
    profile = profile_model(
        bench.model, bench.calibration, refs=all_refs, name=bench.name, timing=True, repeats=5 if timing else 2
    )
    parts = feed_forwards(bench.model, all_refs) if narrows(the_recipe) else {}
    candidates = candidates_for(refs, the_recipe, the_target, width, parts)
    more_bytes, attention_bytes = range_bytes(limits, candidates, all_refs, the_recipe.attention)
    groups = fused_groups(refs, the_target)
    blocks = find_blocks_or_none(bench.model)
    settings = protected_blocks(the_recipe.allocator_settings, sum(len(stack) for stack in blocks))
    ms = measured_times(profile.rows, get_parameter(bench.model, refs[0].parameter).dtype) if timing else None
    cache = free_rows(bench.model, bench.calibration, profile, limits, the_target, the_recipe.cache_shares)
    refuse_unreachable(
        limits,
        profile,
        refs,
        candidates,
        the_recipe,
        the_target,
        element_bytes=width,
        blocks=blocks,
        ms=ms,
        settings=settings,
        parts=parts,
        cache=cache,
        free=removable(bench.model, blocks) if the_recipe.drop_blocks else None,
    )
    working = prepared(bench, the_recipe, seed, progress)
    costs = prepared_profile(profile, bench.model, working.model)
    bounds = prepared_limits(limits, profile.total, costs.total, refs, the_recipe.group_size, width)
    label = {"name": bench.name, "fingerprint": profile.fingerprint, "architecture": type(bench.model).__name__}
    if the_recipe.decider:
        task = Task(working, the_recipe, limits, bounds, refs, blocks, costs, width, the_target, seed, progress)
        table, allocation, choice = run_decider(task, ms)
        table = replace(table, original=profile.total)
        plan = Plan.from_allocation(
            allocation,
            model=label,
            budget=str(limits),
            recipe=the_recipe.name,
            target=the_target.name,
            seed=seed,
            notes=choice.notes,
            base_loss=profile.loss,
            prepare=the_recipe.prepare,
        )
        if scores_folder is not None:
            for found in choice.scores.values():
                found.save(scores_folder)
        return Decision(
            plan, allocation, table, profile, refs, bounds, the_recipe, the_target, choice.scores, choice.extra
        )
    scores = measure_scores(
        working,
        the_recipe,
        candidates,
        refs,
        blocks,
        seed=seed,
        folder=scores_folder,
        progress=progress,
        fingerprint=profile.fingerprint,
    )
    drops = removal_damages(scores["blocks"]) if "blocks" in scores else None
    if drops is not None and the_recipe.allocator not in COUNTS_PLACES:
        drops = leave_one(drops, blocks)
    table = option_table(
        costs,
        refs,
        candidates,
        scores.get("layers"),
        element_bytes=width,
        blocks=blocks,
        ms=ms,
        parts=parts,
        drop_scores=drops,
    )
    table = replace(table, original=profile.total)
    if groups:
        table = merge_ties(table, groups)
    if cache:
        if progress:
            progress("scoring: cache budgets", 0, 1)
        cache, scores["cache"] = measured_rows(working, cache, the_recipe.score_samples)
        table = with_rows(table, cache)
    table = filter_target(table, the_target)
    if "bytes" in bounds:
        bounds["bytes"] += more_bytes - attention_bytes
    solve = partial(ALLOCATORS.get(the_recipe.allocator), limits=bounds, seed=seed, **settings)
    allocation, notes = solve(table), ""
    if the_recipe.measured_choice:
        table, allocation, notes = choose_by_measuring(working, table, allocation, solve, the_recipe.score_samples)
    refuse_empty([o.layer for o in allocation.chosen if _drops(o)], blocks, limits)
    allocation = with_attention_bits(allocation, all_refs, the_recipe.attention, scores.get("layers"))
    plan = Plan.from_allocation(
        allocation,
        model=label,
        budget=str(limits),
        recipe=the_recipe.name,
        target=the_target.name,
        seed=seed,
        notes=notes,
        base_loss=profile.loss if in_loss_units(scores) else None,
        prepare=the_recipe.prepare,
    )
    return Decision(plan, allocation, table, profile, refs, bounds, the_recipe, the_target, scores)


def _drops(option: Option) -> bool:
    return any(t.scope == "block" for t in option.treatments)


def prepared(bench: Bench, the_recipe: Recipe, seed: int, progress: Progress | None = None) -> Bench:
    """The bench with the recipe's preparation done on a copy of its model; itself where there is none."""
    if not the_recipe.prepare:
        return bench
    if progress:
        progress(f"preparing: {', '.join(the_recipe.prepare)}", 0, 1)
    model = structure_copy(bench.model)
    prepare_(model, the_recipe.prepare, bench.calibration, seed=seed)
    return replace(bench, model=model)


def in_loss_units(scores: Mapping[str, Scores]) -> bool:
    """Whether damages add to the loss; some scorers only rank."""
    return all(found.meta.get("loss_units", True) for found in scores.values())


def removal_damages(scores: Scores) -> Scores:
    """Block scores as damages of removal: perplexities become losses above the base, in the same order; a block that
    counts as indispensable (an infinite score) is no candidate. Other scores stay as they are.
    """
    found = {path: value for path, value in scores.sensitivities.items() if math.isfinite(value)}
    if scores.scorer == "block_perplexity":
        found = {path: math.log(value) - (scores.base_loss or 0.0) for path, value in found.items()}
    return replace(scores, sensitivities=found)


def protected_blocks(settings: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Allocator settings with `protect_first` and `protect_last` as counts: a share below 1 is one of all blocks,
    rounded up.
    """
    shares = {
        key: math.ceil(value * depth - 1e-9)
        for key, value in settings.items()
        if key in ("protect_first", "protect_last") and isinstance(value, float) and 0 < value < 1
    }
    return {**settings, **shares}


def plan_model(bench: Bench, budget: str | Budget, chosen: str | Recipe | None = None, **settings: Any) -> Plan:
    """The plan alone; see `decide`."""
    return decide(bench, budget, chosen, **settings).plan


def uniform_layers(
    refs: tuple[LayerRef, ...], limit_bytes: float, fixed: Cost, group_size: int, width: int
) -> tuple[dict[str, Treatments], str]:
    """The uniform baseline at equal bytes: GPTQ with one width for all layers, one bit more for the first layers
    until the bytes are used up. Returns the treatments and a description.
    """
    room = limit_bytes - fixed.bytes
    bits = next((b for b in range(8, 1, -1) if uniform_bytes(refs, b, group_size, width) <= room), 2)
    used = uniform_bytes(refs, bits, group_size, width)
    chosen: dict[str, Treatments] = {}
    more = 0
    for ref in refs:
        group = group_size if group_size != -1 and ref.shape[1] % group_size == 0 else -1
        step = uniform_bytes([ref], bits + 1, group_size, width) - uniform_bytes([ref], bits, group_size, width)
        upgrade = bits < 8 and used + step <= room
        used += step if upgrade else 0
        more += upgrade
        chosen[ref.path] = (Quantize(bits + upgrade, group),)
    words = f"uniform {bits}-bit GPTQ" + (f", {bits + 1} bits in the first {more} layers" if more else "")
    return chosen, words if used <= room + 0.5 else f"{words} (the smallest uniform one; over the budget)"
