"""Recipes: the whole job, its stages and its library of named methods."""

from layerwright.recipes.bench import Bench, open_bench
from layerwright.recipes.book import default_recipe, recipe, recipes
from layerwright.recipes.check import check_job
from layerwright.recipes.initialise import Initialised, initialise
from layerwright.recipes.inspect import inspect_model
from layerwright.recipes.job import Decision, decide
from layerwright.recipes.measure import Measurement, measure
from layerwright.recipes.optimize import OptimizeResult, optimize
from layerwright.recipes.shape import ShapeReport, ShapeSettings, compare_shapes, enumerate_shapes, parse_count

__all__ = [
    "Bench",
    "Decision",
    "Initialised",
    "Measurement",
    "OptimizeResult",
    "ShapeReport",
    "ShapeSettings",
    "check_job",
    "compare_shapes",
    "decide",
    "default_recipe",
    "enumerate_shapes",
    "initialise",
    "inspect_model",
    "measure",
    "open_bench",
    "optimize",
    "parse_count",
    "recipe",
    "recipes",
]
