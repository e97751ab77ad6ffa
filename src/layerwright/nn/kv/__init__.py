"""Key-value caches with a budget of tokens for each layer.

- `KVBudget` (of `core.treatment`) as a module beside attention: `CacheBudget`, `budget_cache_`, `cache_budgets`, `make_cache`.
- `layerwright.nn.kv.cache.BudgetedCache`: a cache for ``generate``; `held_bytes` of any cache.
- `layerwright.nn.kv.attention.budgeted_attention`: the context in which a model follows it.
- `layerwright.nn.kv.keep.POLICIES`: window, streaming, h2o.

The modules `cache` and `attention` load transformers; this page does not.
"""

from __future__ import annotations

from layerwright.nn.kv.attach import CacheBudget, budget_cache_, cache_budgets, make_cache

__all__ = ["CacheBudget", "budget_cache_", "cache_budgets", "make_cache"]
