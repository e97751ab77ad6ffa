"""Masks and attention weights for caches that hold other tokens in each layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers
from layerwright.core.treatment import KVBudget
from layerwright.nn.attached import attached
from layerwright.nn.kv.cache import BudgetedLayer, Rotate, StaticCacheError
from layerwright.nn.kv.keep import heavy_hitter_mask, past_mask, recent_tokens
from layerwright.nn.rounded_cache import CACHE_ARGUMENTS, takes_cache

__all__ = ["CHILD", "budgeted_attention", "cache_owners", "enter", "leave"]

CHILD = "cache_budget"
"""Name of the attachment that does the same for a treated model."""

_NAME = "layerwright_kv"
_CHUNK = 128
"""Queries whose attention weights are computed at a time."""


@dataclass
class _Run:
    """One call of an attention module that is under way."""

    layer: BudgetedLayer | None
    budget: KVBudget | None
    implementation: str | None
    seen: bool = False


_RUNNING: dict[int, _Run] = {}


def cache_owners(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules that are handed a cache, by path, in the order of their layers.

    Raises:
        InputError: an encoder-decoder model, or none of them.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} is an encoder-decoder model; cache budgets are for decoders")
    found = {}
    for ref in list_layers(model):
        module = model.get_submodule(ref.path) if ref.kind == "attention" else None
        if module is not None and takes_cache(module) and isinstance(getattr(module, "layer_idx", None), int):
            found[ref.path] = module
    if not found:
        raise InputError(f"{type(model).__name__} has no attention that is handed a key-value cache")
    return dict(sorted(found.items(), key=lambda item: int(item[1].layer_idx)))  # type: ignore[arg-type]


@contextmanager
def budgeted_attention(model: nn.Module) -> Iterator[nn.Module]:
    """Context: a `BudgetedCache` may be handed to `model` and to its ``generate``.

    Each attention module gets the columns of the mask that belong to the tokens its layer holds, and H2O layers get the
    attention that they choose by. Works with eager and SDPA attention, batches, left padding, grouped queries and beams;
    other caches pass through. Hooks are removed on leaving.

    Raises:
        InputError: a model without such modules; while it runs, an attention implementation that cannot be followed.
    """
    handles = []
    for module in cache_owners(model).values():
        if attached(module, CHILD) is None:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], budget: KVBudget | None = None) -> Any:
    """Before an attention module runs: its arguments with the mask of what its layer holds.

    `budget` makes a budgeted layer of an empty one, and without a cache lets each token see what the cache would hold.
    """
    if id(module) in _RUNNING:
        return None
    name = next((name for name in CACHE_ARGUMENTS if name in kwargs), "")
    mask, hidden = kwargs.get("attention_mask"), first_tensor(args or kwargs)
    layer = _layer_of(kwargs.get(name), int(module.layer_idx), budget)  # type: ignore[arg-type]
    if layer is None and budget is None:
        return None
    implementation = _implementation(module)
    if kwargs.get("alibi") is not None:
        raise InputError("model: its positions are biases of all tokens (ALiBi); cache budgets need them in the keys")
    new = hidden.shape[1]
    policy = budget.policy if layer is None and budget is not None else getattr(layer, "policy", "")
    if layer is not None:
        layer.prepare(_real(mask, new, hidden.shape[0]), _rotation(module) if layer.position_mode == "cache" else None)
        if mask is not None and layer.evicted:
            mask = _held_columns(mask, layer, new, int(getattr(module, "num_key_value_groups", 1)))
    elif budget is not None and policy != "h2o" and new > budget.tokens + 1:
        real = _real(mask, new, hidden.shape[0])
        real = torch.ones(hidden.shape[0], new, dtype=torch.bool, device=hidden.device) if real is None else real
        seen = past_mask(real, budget.tokens, budget.policy, budget.sinks)[:, None]
        mask = _narrowed(mask, seen, hidden.dtype, implementation)
    if policy == "h2o":
        _RUNNING[id(module)] = _Run(layer, budget, implementation)
        module.config._attn_implementation = _NAME  # type: ignore[union-attr]
    else:
        _RUNNING[id(module)] = _Run(layer, budget, None)
    return args, ({**kwargs, "attention_mask": mask} if "attention_mask" in kwargs or mask is not None else kwargs)


def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After it ran, or failed: everything as it was.

    Raises:
        InputError: the module did not say what attention its tokens got, and its layer needs to know.
    """
    run = _RUNNING.pop(id(module), None)
    if run is None or run.implementation is None:
        return
    module.config._attn_implementation = run.implementation  # type: ignore[union-attr]
    if output is not None and not run.seen:
        raise InputError(
            f"attn_implementation: {type(module).__name__} does not give its attention weights, which h2o needs; use the "
            "policy window or streaming"
        )


def _layer_of(cache: Any, index: int, budget: KVBudget | None) -> BudgetedLayer | None:
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    kind = getattr(cache, "layer_class_to_replicate", None)
    while kind is not None and len(layers) <= index:
        layers.append(kind())
    layer = layers[index]
    if isinstance(layer, BudgetedLayer):
        return layer
    if isinstance(layer, StaticLayer):
        raise StaticCacheError("cache: a static cache keeps its shape; tokens are evicted from a dynamic one only")
    if budget is None:
        return None
    if type(layer) is not DynamicLayer or layer.get_seq_length():
        state = "that holds tokens already" if type(layer) is DynamicLayer else "of another kind"
        raise InputError(
            f"cache: got a {type(layer).__name__} {state}; let the model make one, or use make_cache(model)"
        )
    layers[index] = made = BudgetedLayer(
        budget.tokens, budget.policy, budget.sinks, budget.recent_fraction, budget.positions
    )
    return made


def _implementation(module: nn.Module) -> str:
    name = str(getattr(getattr(module, "config", None), "_attn_implementation", None))
    if name not in ("eager", "sdpa"):
        raise InputError(
            f"attn_implementation: got {name}, whose masks cannot be followed; call model.set_attn_implementation('sdpa')"
        )
    return name


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _real(mask: Tensor | None, new: int, batch: int) -> Tensor | None:
    """Which of the new tokens are no padding ``(batch, new)``: the last one sees every one that is not."""
    if mask is None:
        return None
    if mask.dim() != 4:
        raise InputError(f"attention_mask: attention modules got {tuple(mask.shape)}, expected four dimensions")
    return _allowed(mask[:, 0, -1, -new:]).expand(batch, -1)


def _held_columns(mask: Tensor, layer: BudgetedLayer, new: int, groups: int) -> Tensor:
    """The columns of a mask over all tokens that belong to those that are held and to the new ones."""
    assert layer.places is not None
    total = layer.cumulative_length + new
    if mask.shape[-1] != total:
        raise InputError(f"attention_mask: it is for {mask.shape[-1]} tokens, and {total} were seen; give one for all")
    coming = torch.arange(layer.cumulative_length, total, device=mask.device)
    index = torch.cat([layer.places, coming.expand(*layer.places.shape[:2], new)], dim=-1)
    index = index.repeat_interleave(groups, 1) if index.shape[1] > 1 else index
    heads = max(index.shape[1], mask.shape[1])
    picked = index[:, :, None].expand(-1, heads, mask.shape[-2], -1)
    return mask.expand(index.shape[0], heads, -1, -1).gather(-1, picked)


def _narrowed(mask: Tensor | None, seen: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    """`mask` where `seen` ``(batch, 1 or heads, queries, keys)`` and nothing elsewhere."""
    if mask is None and implementation == "sdpa":
        return seen
    if mask is None:
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _rotation(module: nn.Module) -> Rotate:
    """How keys of `module` are moved by so many positions, by the model's own rotary functions."""
    source: Any = sys.modules[type(module).__module__]
    kinds = [value for key, value in vars(source).items() if key.endswith("RotaryEmbedding")]
    apply = getattr(source, "apply_rotary_pos_emb", None)
    rotary: Any = kinds[0](config=module.config) if kinds and apply else None
    if rotary is None or getattr(rotary, "rope_type", "") not in ("default", "linear", "llama3", "yarn"):
        raise InputError(
            f"positions: cache needs rotary embeddings of fixed frequencies, {type(module).__name__} has none"
        )

    def rotate(keys: Tensor, steps: Tensor) -> Tensor:
        flat = keys.reshape(-1, 1, *keys.shape[-2:])
        cosine, sine = rotary.to(keys.device)(flat, steps.reshape(-1, steps.shape[-1]))
        scale = rotary.attention_scaling
        assert apply is not None
        moved: Tensor = apply(flat, flat, cosine / scale, sine / scale)[1]
        return moved.reshape(keys.shape)

    return rotate


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any) -> Any:
    """The model's own attention, and beside it the weights that an H2O layer chooses by."""
    run = _RUNNING[id(module)]
    run.seen = True
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    inner: Any = ALL_ATTENTION_FUNCTIONS.get_interface(run.implementation, eager)  # type: ignore[arg-type]
    if run.layer is None and run.budget is not None and query.shape[2] > run.budget.tokens + 1:
        attention_mask = _heavy_mask(module, query, key, attention_mask, run.budget, settings)
    output = inner(module, query, key, value, attention_mask, **settings)
    if run.layer is not None:
        run.layer.observe(_received(query, key, attention_mask, run.layer, settings))
    return output


def _scaled(query: Tensor, key: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> Tensor:
    """Scores before the softmax ``(batch, kv heads, group, queries, keys)`` in float32, masked."""
    batch, heads, queries, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], queries, width)
    scaling = settings.get("scaling")
    scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped.float(), key.float())
    scores = scores * (width**-0.5 if scaling is None else scaling)
    softcap = settings.get("softcap")
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if mask is None:
        return scores
    allowed = _allowed(mask).expand(batch, heads, -1, -1)
    return scores.masked_fill(~allowed.reshape(scores.shape), torch.finfo(torch.float32).min)


@torch.no_grad()
def _received(
    query: Tensor, key: Tensor, mask: Tensor | None, layer: BudgetedLayer, settings: dict[str, Any]
) -> Tensor:
    """Attention that each slot gets from the real queries ``(batch, kv heads, slots)``, `_CHUNK` queries at a time."""
    assert layer.real is not None
    queries, slots = query.shape[2], key.shape[2]
    real = layer.real[:, :, -queries:]
    total = torch.zeros(query.shape[0], key.shape[1], slots, device=key.device)
    place = torch.arange(slots, device=key.device)
    for start in range(0, queries, _CHUNK):
        rows = slice(start, min(start + _CHUNK, queries))
        part = mask
        if mask is None:
            part = (place <= (place[slots - queries :][rows, None]))[None, None]
        elif mask.shape[-2] > 1:
            part = mask[:, :, rows]
        weights = _scaled(query[:, :, rows], key, part, settings).softmax(-1)
        total += (weights * real[:, :, None, rows, None]).sum(dim=(2, 3))
    return total


@torch.no_grad()
def _heavy_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, budget: KVBudget, settings: dict[str, Any]
) -> Tensor:
    """The mask of a pass without cache in which every layer held `budget`; holds one layer's scores in memory."""
    batch, heads, tokens, _ = query.shape
    real = _real(mask, tokens, batch)
    real = torch.ones(batch, tokens, dtype=torch.bool, device=query.device) if real is None else real
    scores = _scaled(query, key, mask, settings)
    seen = heavy_hitter_mask(scores, real, budget.tokens, recent_tokens(budget.tokens, budget.recent_fraction))
    return _narrowed(
        mask, seen.repeat_interleave(heads // key.shape[1], 1), query.dtype, _RUNNING[id(module)].implementation or ""
    )


AttentionInterface.register(_NAME, _attend)
