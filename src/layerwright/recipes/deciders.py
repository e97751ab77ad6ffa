"""Recipes that decide in their own way: by measuring as they go, over rows, or by rules instead of an option table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerwright.core.blocks import Blocks
from layerwright.core.budget import Budget
from layerwright.core.layer import LayerRef
from layerwright.core.option import Scores
from layerwright.core.profile import Profile
from layerwright.core.recipe import Recipe
from layerwright.core.registry import Registry
from layerwright.core.target import Target
from layerwright.core.treatment import Treatments
from layerwright.recipes.bench import Bench

__all__ = ["DECIDERS", "Choice", "Decider", "Task"]


@dataclass(frozen=True)
class Task:
    """What a decider is asked.

    Attributes:
        bench: model and data; the model is prepared already (`Recipe.prepare`), and must be left as it is.
        recipe: the recipe, with `decider_settings`.
        budget: as the user wrote it.
        limits: the same as upper bounds on the whole model by field of `Cost`; a decider holds those that it can and
            refuses the others with a `BudgetError`.
        refs: layers that may be treated.
        blocks: the model's stacks.
        profile: costs of every layer as it is.
        element_bytes: bytes of one untreated weight.
        target: what must load the result.
        seed: of everything random.
        progress: ``progress(words, done, total)``, or None.
    """

    bench: Bench
    recipe: Recipe
    budget: Budget
    limits: Mapping[str, float]
    refs: tuple[LayerRef, ...]
    blocks: tuple[Blocks, ...]
    profile: Profile
    element_bytes: int
    target: Target
    seed: int = 0
    progress: Callable[[str, int, int], None] | None = None


@dataclass(frozen=True)
class Choice:
    """What a decider chose.

    Attributes:
        layers: treatments by path of a layer, a block or an attention module.
        damage: predicted increase of the loss; NaN where the method has no such prediction.
        reasons: path to one sentence.
        notes: one sentence on how it came about.
        scores: what was measured on the way, by purpose, to be saved.
        extra: plain data for the report.
    """

    layers: Mapping[str, Treatments]
    damage: float = float("nan")
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""
    scores: Mapping[str, Scores] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


Decider = Callable[[Task], Choice]

DECIDERS: Registry[Decider] = Registry("decider")
"""Deciders by name; `Recipe.decider` names one, which then takes the place of scorer and allocator."""

DECIDERS.add("fptq", "layerwright.recipes.fptq:decide_fptq")
DECIDERS.add("mixllm", "layerwright.recipes.mixllm:decide_mixllm")

DECIDERS.add("measured_descent", "layerwright.recipes.measured_descent:decide_descent")
DECIDERS.add("one_precision", "layerwright.recipes.measured_descent:decide_uniform")
DECIDERS.add("mixed_td", "layerwright.recipes.mixed_td:decide_mixed_td")
DECIDERS.add("squeeze_attention", "layerwright.recipes.squeeze:decide_squeeze")
DECIDERS.add("luc", "layerwright.recipes.luc:decide_luc")
DECIDERS.add("iterative_drop", "layerwright.recipes.depth:decide_iteratively")
DECIDERS.add("interleaved_drop", "layerwright.recipes.depth:decide_interleaved")
