"""Cache budgets that travel with a model: beside its attention modules, and into every cache that it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.treatment import KVBudget
from layerwright.nn.attached import Attachment, attached

if TYPE_CHECKING:
    from layerwright.nn.kv.cache import BudgetedCache

__all__ = ["CacheBudget", "budget_cache_", "cache_budgets", "make_cache"]


class CacheBudget(Attachment):
    """Limits the tokens that an attention module's cache holds, whichever dynamic cache the model is given or makes.

    With a cache, empty layers become budgeted ones and their masks follow. Without one, each token sees what the cache
    would hold had the text been decoded from its first token, so that losses of whole texts are those of generation.
    Nothing is stored.

    Args:
        budget: the limit and the policy.
    """

    child = "cache_budget"

    def __init__(self, budget: KVBudget) -> None:
        super().__init__()
        self.budget = budget

    def before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same arguments with the mask of what is held."""
        from layerwright.nn.kv.attention import enter

        return enter(owner, args, kwargs, self.budget)

    def after(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Put the attention implementation back."""
        from layerwright.nn.kv.attention import leave

        leave(owner, args, kwargs, output)

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "cache_budget", **dataclasses.asdict(self.budget)}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """An attachment of that form."""
        return cls(KVBudget(**{key: value for key, value in spec.items() if key != "type"}))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return self.budget.label()


def budget_cache_(model: nn.Module, budgets: Mapping[str, KVBudget]) -> list[str]:
    """Limit the caches of the attention modules named in `budgets`, in place.

    Args:
        model: a decoder whose layers all attend to every token.
        budgets: path of an attention module to its budget.

    Returns:
        The paths.

    Raises:
        InputError: a path that is no attention module with a cache, or a model with another kind of cache.
    """
    from layerwright.nn.kv.attention import cache_owners
    from layerwright.nn.kv.cache import plain_layers

    owners = cache_owners(model)
    if hasattr(model, "config"):
        plain_layers(model.config)
    for path in budgets:
        if path not in owners:
            raise unknown_name("attention module", path, owners, "budgets")
    for path, budget in budgets.items():
        CacheBudget(budget).attach_(owners[path])
    return list(budgets)


def cache_budgets(model: nn.Module) -> dict[str, KVBudget]:
    """The budget of every attention module that has one."""
    found = {}
    for path, module in model.named_modules():
        child = attached(module, CacheBudget.child)
        if isinstance(child, CacheBudget):
            found[path] = child.budget
    return found


def make_cache(model: nn.Module) -> BudgetedCache:
    """An empty cache with the budgets of `model`; layers without one hold everything.

    ``model.generate(...)`` makes one by itself; this is for loops of one's own.

    Raises:
        InputError: the model has no budgets.
    """
    from layerwright.nn.kv.attention import cache_owners
    from layerwright.nn.kv.cache import BudgetedCache, BudgetedLayer, plain_layers

    budgets = cache_budgets(model)
    if not budgets:
        raise InputError(f"{type(model).__name__} has no cache budgets: apply a plan with kv treatments first")
    layers = [BudgetedLayer(None) for _ in range(plain_layers(model.config))]
    for path, module in cache_owners(model).items():
        own = budgets.get(path)
        if own is not None:
            number = int(module.layer_idx)  # type: ignore[arg-type]
            layers[number] = BudgetedLayer(own.tokens, own.policy, own.sinks, own.recent_fraction, own.positions)
    return BudgetedCache.of_layers(layers)
