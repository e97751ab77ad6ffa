"""A key-value cache with a budget of tokens for each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from layerwright.core.errors import InputError, LayerwrightError, unknown_name
from layerwright.nn.kv.keep import POLICIES, choose_kept, recent_tokens

__all__ = ["BudgetedCache", "BudgetedLayer", "EvictedError", "StaticCacheError", "held_bytes"]

Rotate = Callable[[Tensor, Tensor], Tensor]
"""``rotate(keys (batch, heads, slots, width), positions to add (batch, heads, slots)) -> keys``."""


class EvictedError(LayerwrightError, RuntimeError):
    """What was evicted is needed again."""


class StaticCacheError(LayerwrightError, NotImplementedError):
    """Shapes change when tokens are evicted, so that static and compiled caches cannot do it."""


class BudgetedLayer(DynamicLayer):  # type: ignore[misc] # transformers has no types
    """One layer of a `BudgetedCache`: after each update at most `budget` tokens are held; None holds all.

    The tokens that are computed attend to what was held before and to each other; a prompt sees itself fully. Keys and
    values ``(batch, kv heads, held, width)`` come with their positions and with whether they are padding,
    ``(batch, 1 or kv heads, held)``.
    """

    is_croppable = False
    is_compileable = False
    is_initialized: bool
    keys: Any
    values: Any

    def __init__(
        self,
        budget: int | None,
        policy: str = "window",
        sinks: int = 4,
        recent_fraction: float = 0.5,
        positions: str = "absolute",
    ) -> None:
        super().__init__()
        self.budget, self.policy, self.sinks = budget, policy, sinks
        self.recent_fraction, self.position_mode = recent_fraction, positions
        self._forget()

    def _forget(self) -> None:
        self.cumulative_length = 0
        self.places: Tensor | None = None
        self.real: Tensor | None = None
        self.scores: Tensor | None = None
        self.evicted = False
        self.awaits_scores = False
        self._coming: Tensor | None = None
        self._prepared = False
        self._rotate: Rotate | None = None

    @property
    def held(self) -> int:
        """Tokens that are held now."""
        return 0 if self.places is None else int(self.places.shape[-1])

    def prepare(self, real: Tensor | None, rotate: Rotate | None = None) -> None:
        """Announce the next update: which of its tokens are real ``(batch, new)`` (None: all), and how keys are moved."""
        self._coming, self._rotate, self._prepared = real, rotate, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; returns what they may attend to: all that was held before them, and themselves.

        Raises:
            EvictedError: tokens were evicted, and no `budgeted_attention` told the masks.
            InputError: an H2O layer got no attention weights.
            StaticCacheError: under ``torch.compile``.
        """
        if torch.compiler.is_compiling():
            raise StaticCacheError("a budgeted cache changes its shapes: run the model without torch.compile")
        if self.awaits_scores:
            raise InputError(
                "attn_implementation: h2o got no attention weights; run the model inside budgeted_attention(model), with "
                "attn_implementation eager or sdpa"
            )
        if self.evicted and not self._prepared:
            raise EvictedError(
                "tokens were evicted and masks must follow: run the model inside budgeted_attention(model)"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._prepared = False
        heads = key_states.shape[1] if self.policy == "h2o" else 1
        self._add_places(key_states.shape[0], heads, key_states.shape[-2])
        self.keys = keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = values = torch.cat([self.values, value_states], dim=-2)
        attended = self._moved(keys) if self.position_mode == "cache" and self.evicted else keys
        if self.policy == "h2o":
            self.awaits_scores = True
        else:
            self._evict()
        return attended, values

    def _add_places(self, batch: int, heads: int, count: int) -> None:
        shape = (batch, heads, count)
        start = self.cumulative_length
        places = torch.arange(start, start + count, device=self.device).expand(shape)
        real = torch.ones(shape, dtype=torch.bool, device=self.device)
        if self._coming is not None:
            real = self._coming.to(self.device)[:, None].expand(shape)
        self._coming = None
        self.cumulative_length += count
        self.places = places if self.places is None else torch.cat([self.places, places], -1)
        self.real = real if self.real is None else torch.cat([self.real, real], -1)
        if self.policy == "h2o":
            fresh = torch.zeros(shape, device=self.device)
            self.scores = fresh if self.scores is None else torch.cat([self.scores, fresh], -1)

    def observe(self, received: Tensor) -> None:
        """Add the attention ``(batch, kv heads, slots)`` that the last update's tokens gave, and evict by it (H2O)."""
        assert self.scores is not None
        self.scores = self.scores + received
        self.awaits_scores = False
        self._evict()

    def squeeze(self, budget: int | None) -> None:
        """Hold at most `budget` tokens from now on.

        Raises:
            EvictedError: a larger budget than that by which tokens were evicted.
        """
        if self.evicted and (budget is None or self.budget is None or budget > self.budget):
            raise EvictedError(f"budget: {self.budget} tokens were kept, {budget} cannot be restored")
        self.budget = budget
        if self.places is not None:
            self._evict()

    def _evict(self) -> None:
        if self.budget is None or self.held <= self.budget:
            return
        assert self.places is not None and self.real is not None
        recent = recent_tokens(self.budget, self.recent_fraction)
        kept = choose_kept(self.real, self.budget, self.policy, sinks=self.sinks, recent=recent, scores=self.scores)
        self.places, self.real = self.places.gather(-1, kept), self.real.gather(-1, kept)
        if self.scores is not None:
            self.scores = self.scores.gather(-1, kept)
        # Gathered, not sliced: a slice would keep the memory of what was evicted.
        wide = kept[..., None].expand(-1, self.keys.shape[1], -1, self.keys.shape[-1])
        self.keys = self.keys.gather(-2, wide)
        self.values = self.values.gather(
            -2, kept[..., None].expand(-1, self.values.shape[1], -1, self.values.shape[-1])
        )
        self.evicted = True

    def _moved(self, keys: Tensor) -> Tensor:
        """Keys as if the tokens stood side by side before the last one: only distances count in rotary embeddings."""
        if self._rotate is None:
            raise InputError("positions: cache needs rotary embeddings and budgeted_attention(model)")
        assert self.places is not None
        slots = self.places.shape[-1]
        target = self.places[..., -1:] - torch.arange(slots - 1, -1, -1, device=self.places.device)
        return self._rotate(keys, (target - self.places).expand(-1, keys.shape[1], -1))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are built for all tokens seen; `budgeted_attention` takes the columns of those that are held."""
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen: positions go on counting."""
        return self.cumulative_length

    def reset(self) -> None:
        """Empty, with the same budget."""
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: evicted tokens cannot be restored.

        Raises:
            EvictedError: always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise EvictedError("evicted tokens cannot be restored: assisted decoding needs a cache without a budget")

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "places", "real", "scores"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.numel():
                setattr(self, name, change(value))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of `beam_idx`."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._map(lambda x: x[indices])

    def held_bytes(self) -> int:
        """Bytes of the keys and values that are held."""
        return sum(x.untyped_storage().nbytes() for x in (self.keys, self.values) if isinstance(x, Tensor))


class BudgetedCache(Cache):  # type: ignore[misc]
    """A cache that holds at most so many tokens in each layer, for ``model.generate(..., past_key_values=cache)``.

    Use it inside `budgeted_attention`, which gives each layer the mask of the tokens that it holds. A budget that no
    layer reaches changes nothing, to the bit. Memory: ``sum(budgets) * 2 * kv heads * width * bytes`` for each row of the
    batch, and one layer's new tokens while it computes. Sources: Wang et al. (2024, arXiv 2404.04793) for budgets by
    layer; see `POLICIES` for the policies.

    Args:
        config: the model's configuration.
        budgets: tokens of each layer; one number for all; None holds everything, until `squeeze`.
        policy: ``window``, ``streaming`` or ``h2o``.
        sinks: first tokens that `streaming` keeps.
        recent_fraction: share of the budget that `h2o` gives to the latest tokens.
        positions: ``absolute``, or ``cache`` for positions within the cache (rotary embeddings).

    Raises:
        InputError: as many budgets as layers are needed, each at least ``sinks + 1``; an unknown policy; a model with
            layers that keep a cache of another kind (sliding windows, linear attention).
    """

    def __init__(
        self,
        config: Any,
        budgets: Sequence[int | None] | int | None = None,
        policy: str = "window",
        sinks: int = 4,
        recent_fraction: float = 0.5,
        positions: str = "absolute",
    ) -> None:
        if policy not in POLICIES:
            raise unknown_name("policy", policy, POLICIES)
        if positions not in ("absolute", "cache"):
            raise unknown_name("positions", positions, ("absolute", "cache"))
        if not 0 <= recent_fraction <= 1:
            raise InputError(f"recent_fraction: got {recent_fraction}, expected a share from 0 to 1")
        kinds = plain_layers(config)
        each = _each(budgets, kinds)
        _check(each, kinds, sinks)
        super().__init__(layers=[BudgetedLayer(budget, policy, sinks, recent_fraction, positions) for budget in each])
        self._sinks = sinks

    @classmethod
    def of_layers(cls, layers: Sequence[CacheLayerMixin]) -> Self:
        """A cache of layers that were made one by one."""
        cache = cls.__new__(cls)
        Cache.__init__(cache, layers=list(layers))
        cache._sinks = 0
        return cache

    @property
    def budgets(self) -> tuple[int | None, ...]:
        """Tokens of each layer; None where everything is held."""
        return tuple(getattr(layer, "budget", None) for layer in self.layers)

    def squeeze(self, budgets: Sequence[int | None] | int | None) -> None:
        """Compress what is held to `budgets`, which hold from now on.

        Raises:
            InputError: as on construction.
            EvictedError: a budget above the one by which tokens were evicted.
        """
        each = _each(budgets, len(self.layers))
        _check(each, len(self.layers), self._sinks)
        for layer, budget in zip(self.layers, each, strict=True):
            layer.squeeze(budget)

    def held_bytes(self) -> int:
        """Bytes of all keys and values that are held."""
        return held_bytes(self)


def held_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that `cache` holds, of whatever kind it is."""
    total = 0
    for layer in cache.layers:
        for name in ("keys", "values"):
            value = getattr(layer, name, None)
            total += value.untyped_storage().nbytes() if isinstance(value, Tensor) else 0
    return total


def plain_layers(config: Any) -> int:
    """How many layers the model of `config` has, all of which keep every token.

    Raises:
        InputError: layers with a cache of their own kind, or an encoder and a decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise InputError("config: an encoder-decoder model; budgets are for decoders")
    layers = DynamicCache(config=config).layers
    for number, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            raise InputError(
                f"config: layer {number} keeps a {type(layer).__name__}, which has its own limit or state; budgets are "
                "for models whose layers all attend to every token"
            )
    return len(layers)


def _each(budgets: Sequence[int | None] | int | None, layers: int) -> list[int | None]:
    if budgets is None or isinstance(budgets, int):
        return [budgets] * layers
    return [None if budget is None else int(budget) for budget in budgets]


def _check(budgets: Sequence[int | None], layers: int, sinks: int) -> None:
    if len(budgets) != layers:
        raise InputError(f"budgets: got {len(budgets)}, expected one for each of {layers} layers")
    if sinks < 0:
        raise InputError(f"sinks: got {sinks}, expected a whole number")
    for number, budget in enumerate(budgets):
        if budget is not None and budget < sinks + 1:
            raise InputError(
                f"budgets: layer {number} got {budget} tokens, expected at least {sinks + 1} (sinks and one more)"
            )
