"""A block's arguments for some of its tokens: hidden states, masks and positions, packed to the left."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["CACHES", "named_arguments", "pack_arguments", "packed_places"]

CACHES = ("past_key_values", "past_key_value", "layer_past")
_ALONG_TOKENS = ("position_ids", "position_embeddings", "cache_position")
_MASK = "attention_mask"


def packed_places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the chosen tokens of each sample stand, and which of the places are used.

    Args:
        mask: boolean ``(batch, tokens)``.

    Returns:
        Indices ``(batch, most chosen)`` in ascending order, filled up with others; boolean of the same shape.
    """
    counts = mask.sum(1)
    most = int(counts.max())
    places = torch.argsort(~mask, dim=1, stable=True)[:, :most]
    return places, torch.arange(most, device=mask.device)[None] < counts[:, None]


def named_arguments(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], bool]:
    """The arguments of a call by their names, and whether `forward` takes one called `name`."""
    bound = inspect.signature(forward).bind(*args, **kwargs)
    variable = {p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD}
    given = {key: value for key, value in bound.arguments.items() if key not in variable}
    for key in variable:
        given |= bound.arguments.get(key, {})
    return given, name in bound.signature.parameters or bool(variable)


def pack_arguments(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], places: Tensor, valid: Tensor
) -> dict[str, Any]:
    """The arguments of a block's `forward`, by name, for the tokens at `places` of each sample.

    Positions stay those of the whole sequence; a chosen token sees the chosen ones that it saw before.

    Raises:
        InputError: a cache, or an argument that cannot be packed.
    """
    given, takes_mask = named_arguments(forward, args, kwargs, _MASK)
    if given.get("use_cache") or any(given.get(name) is not None for name in CACHES):
        raise InputError("use_cache: a routed block of variant 'block' keeps no keys and values; pass use_cache=False")
    first = next(name for name, value in given.items() if isinstance(value, Tensor))
    packed: dict[str, Any] = {}
    for name, value in given.items():
        if name == first:
            packed[name] = _along(value, places)
        elif name in _ALONG_TOKENS and value is not None:
            packed[name] = (
                tuple(_along(v, places) for v in value) if isinstance(value, tuple) else _along(value, places)
            )
        elif name == _MASK:
            packed[name] = _mask(value, places, valid)
        elif isinstance(value, Tensor | tuple):
            raise InputError(f"{name}: a block with this argument cannot run for some tokens alone; use variant='mlp'")
        else:
            packed[name] = value
    if takes_mask:
        packed.setdefault(_MASK, _mask(None, places, valid))
    return packed


def _along(value: Tensor, places: Tensor) -> Tensor:
    """Rows at `places` of ``(batch or 1, tokens, ...)``, or of ``(tokens,)``."""
    if value.dim() == 1:
        return value[places]
    batch = torch.arange(places.shape[0], device=places.device)[:, None]
    return value.expand(places.shape[0], *value.shape[1:])[batch, places]


def _mask(given: Tensor | None, places: Tensor, valid: Tensor) -> Tensor | None:
    """The attention mask among packed tokens ``(batch, heads or 1, packed, packed)``; None where order alone says it."""
    if given is None:
        if bool(valid.all()):
            return None
        size = places.shape[1]
        seen = torch.ones(size, size, dtype=torch.bool, device=places.device).tril()
        return (seen & valid[:, None, :] | torch.eye(size, dtype=torch.bool, device=places.device))[:, None]
    if given.dim() != 4:
        raise InputError(
            f"attention_mask: got shape {tuple(given.shape)}; variant 'block' needs eager or sdpa attention"
        )
    batch = torch.arange(places.shape[0], device=places.device)[:, None, None]
    wide = given.expand(places.shape[0], *given.shape[1:]).transpose(1, 3)  # (batch, keys, queries, heads)
    packed = wide[batch, places[:, :, None], places[:, None, :]].transpose(1, 3)
    plain = packed.dtype == torch.bool
    packed = packed.masked_fill(~valid[:, None, None, :], False if plain else torch.finfo(packed.dtype).min)
    # A place that is not used sees itself: a row that sees nothing would spoil the gradients.
    unused = torch.eye(places.shape[1], dtype=torch.bool, device=places.device) & ~valid[:, :, None]
    return packed.masked_fill(unused[:, None], True if plain else 0.0)
