"""What a recipe needs a model to have, checked before any work, and which recipes serve a model that lacks it."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerwright.core.blocks import Blocks, find_blocks
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers, treatable
from layerwright.recipes.book import recipes

__all__ = ["NEEDS", "has", "require"]


def _blocks(model: nn.Module) -> tuple[Blocks, ...]:
    try:
        return find_blocks(model)
    except InputError:
        return ()


def _vision_transformer(model: nn.Module) -> bool:
    """It reads pixels alone and has attention."""
    reads = getattr(model, "main_input_name", "pixel_values")
    refs = list_layers(model)
    return reads == "pixel_values" and any(r.role == "stem" for r in refs) and any(r.kind == "attention" for r in refs)


def _convolutions(model: nn.Module) -> bool:
    """It has convolutions in two dimensions, besides its stem, that can be factorised."""
    for ref in treatable(model):
        module = model.get_submodule(ref.path) if ref.layout == "conv" else None
        if isinstance(module, nn.Conv2d) and module.groups == 1 and math.prod(module.kernel_size) > 1:
            return True
    return False


def _linear(model: nn.Module, *, inside: bool) -> bool:
    """It has linear layers with weights of their own; `inside` blocks."""
    refs = [ref for ref in treatable(model) if ref.layout in ("linear", "conv1d") and not ref.tied]
    return any(ref.block is not None or not inside for ref in refs)


def _full_cache(model: nn.Module) -> bool:
    """It decodes, and all of its layers attend to every token and keep keys and values."""
    from layerwright.nn.kv.attention import cache_owners
    from layerwright.nn.kv.cache import plain_layers

    try:
        return len(cache_owners(model)) == plain_layers(model.config)
    except (InputError, AttributeError):
        return False


NEEDS: dict[str, Callable[[nn.Module], bool]] = {
    "batchnorm": lambda model: any(isinstance(module, _BatchNorm) for module in model.modules()),
    "blocks": lambda model: bool(_blocks(model)),
    "convolutions": _convolutions,
    "decoder": lambda model: any(stack.role == "decoder" for stack in _blocks(model)),
    "kv_cache": _full_cache,
    "linear_blocks": lambda model: _linear(model, inside=True),
    "linear_layers": lambda model: _linear(model, inside=False),
    "vision_transformer": _vision_transformer,
}
"""What a model can have, by the name that recipes use; a need that is not listed concerns the data."""

_WORDS = {
    "batchnorm": "batch norms",
    "convolutions": "convolutions of one group and more than 1 x 1 besides its stem",
    "kv_cache": "a key-value cache in every layer, without windows or states,",
    "linear_blocks": "linear layers in repeated blocks",
    "linear_layers": "linear layers",
    "vision_transformer": "a vision transformer's attention",
}


def has(need: str, model: nn.Module) -> bool:
    """Whether `model` has what `need` names; names and shapes are looked at only, so that the meta device serves."""
    return NEEDS[need](model) if need in NEEDS else True


def require(need: str, model: nn.Module, recipe_name: str) -> None:
    """Refuse a recipe that `model` cannot serve.

    Raises:
        InputError: names the recipes that can.
    """
    if has(need, model):
        return
    others = [item.name for item in recipes() if item.name != recipe_name and all(has(n, model) for n in item.needs)]
    raise InputError(
        f"recipe {recipe_name} needs a model with {_WORDS.get(need, need)}, and {type(model).__name__} has none; "
        f"recipes for it: {', '.join(others) or 'none'}"
    )
