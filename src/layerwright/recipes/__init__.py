"""Recipes: the whole job, its stages and its library of named methods."""

from layerwright.recipes.bench import Bench, open_bench
from layerwright.recipes.book import default_recipe, recipe, recipes
from layerwright.recipes.check import check_job
from layerwright.recipes.inspect import inspect_model
from layerwright.recipes.job import Decision, decide
from layerwright.recipes.measure import Measurement, measure
from layerwright.recipes.optimize import OptimizeResult, optimize

__all__ = [
    "Bench",
    "Decision",
    "Measurement",
    "OptimizeResult",
    "check_job",
    "decide",
    "default_recipe",
    "inspect_model",
    "measure",
    "open_bench",
    "optimize",
    "recipe",
    "recipes",
]
