"""All recipes by name; a path to a YAML file is a recipe too."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from layerwright.core.budget import Budget
from layerwright.core.errors import unknown_name
from layerwright.core.recipe import Recipe

__all__ = ["default_recipe", "recipe", "recipes"]

_FOLDER = Path(__file__).parent / "library"


@cache
def _library() -> dict[str, Recipe]:
    found = [Recipe.load(path) for path in sorted(_FOLDER.glob("*.yaml"))]
    return {item.name: item for item in found}


def recipes() -> tuple[Recipe, ...]:
    """Every recipe that ships with the package."""
    return tuple(_library().values())


def recipe(name: str | Path | Recipe) -> Recipe:
    """The recipe of that name, or the one in that YAML file; dashes and underscores of a name count alike.

    Raises:
        InputError: unknown; close matches are listed.
    """
    if isinstance(name, Recipe):
        return name
    text = str(name)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise FileNotFoundError(f"no recipe file at {path}")
        return Recipe.load(path)
    alike = {known.replace("-", "_"): item for known, item in _library().items()}
    if text.replace("-", "_") not in alike:
        raise unknown_name("recipe", text, _library())
    return alike[text.replace("-", "_")]


def default_recipe(budget: Budget) -> Recipe:
    """`mixed` where only bits are bounded, `squeeze_attention` where only the cache is; `joint` elsewhere."""
    if all(limit.name == "kv" for limit in budget):
        return recipe("squeeze_attention")
    return recipe("mixed" if all(limit.name == "bits" for limit in budget) else "joint")
