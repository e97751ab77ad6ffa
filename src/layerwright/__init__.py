"""Engineer neural networks one layer at a time.

Verbs: `load`, `inspect`, `plan`, `apply`, `tune`, `measure`, `save`, `optimize`. Nouns: `Budget`, `Calibration`, `Plan`,
`Profile`, `Recipe`, `Scores` and the treatments. Everything is imported when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ApplyReport": "core.records",
    "Budget": "core.budget",
    "Calibration": "core.calibration",
    "Cost": "core.cost",
    "Drop": "core.treatment",
    "Evidence": "core.evidence",
    "Forecast": "core.forecast",
    "KVBudget": "core.treatment",
    "LayerRef": "core.layer",
    "LayerwrightError": "core.errors",
    "LowRank": "core.treatment",
    "Narrow": "core.treatment",
    "Option": "core.option",
    "Plan": "core.plan",
    "Profile": "core.profile",
    "Quantize": "core.treatment",
    "Recipe": "core.recipe",
    "RoundCache": "core.treatment",
    "Scores": "core.option",
    "Sparsify": "core.treatment",
    "Target": "core.target",
    "apply": "recipes.verbs",
    "inspect": "recipes.verbs",
    "load": "data.loading",
    "measure": "recipes.measure",
    "optimize": "recipes.optimize",
    "plan": "recipes.verbs",
    "save": "recipes.verbs",
    "tune": "recipes.verbs",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from layerwright.core.budget import Budget
    from layerwright.core.calibration import Calibration
    from layerwright.core.cost import Cost
    from layerwright.core.errors import LayerwrightError
    from layerwright.core.evidence import Evidence
    from layerwright.core.forecast import Forecast
    from layerwright.core.layer import LayerRef
    from layerwright.core.option import Option, Scores
    from layerwright.core.plan import Plan
    from layerwright.core.profile import Profile
    from layerwright.core.recipe import Recipe
    from layerwright.core.records import ApplyReport
    from layerwright.core.target import Target
    from layerwright.core.treatment import Drop, KVBudget, LowRank, Narrow, Quantize, RoundCache, Sparsify
    from layerwright.data.loading import load
    from layerwright.recipes.measure import measure
    from layerwright.recipes.optimize import optimize
    from layerwright.recipes.verbs import apply, inspect, plan, save, tune


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layerwright' has no attribute {name!r}")
    value = getattr(import_module(f"layerwright.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _VerbRoom(ModuleType):
    """A room that has the name of a verb: to call it is to run the verb."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        verb = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"{__name__}.{_HOMES[verb]}"), verb)(*args, **settings)


class _Package(ModuleType):
    """Importing a room puts it into the package under its name, over the verb `tune`: it is made to stand for both."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value.__class__ = _VerbRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
