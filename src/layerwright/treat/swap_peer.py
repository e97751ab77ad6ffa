"""Put layers of very many small experts in place of feed-forward parts (He, 2024, PEER)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.nn._adaptive_gate import AdaptiveCalls
from layerwright.nn.adaptive import PassOn
from layerwright.nn.peer import PEER
from layerwright.treat._adaptive_sites import Site, find_sites
from layerwright.treat._chosen_blocks import chosen_blocks

__all__ = ["find_peers", "swap_peer"]


def swap_peer(
    model: nn.Module,
    blocks: Sequence[str] | Sequence[int] | str | None = None,
    *,
    num_experts: int = 1024**2,
    heads: int = 8,
    top_k: int = 16,
    query_dim: int = 256,
    seed: int = 0,
    copy: bool = True,
    **settings: Any,
) -> tuple[nn.Module, tuple[str, ...]]:
    """A model in which `PEER` layers stand in place of feed-forward parts (He, 2024, arXiv 2407.04153).

    The new layers know nothing yet: the model is trained afterwards (`tune.peer` does, or any loop). Names outside the
    parts stay, the norm before each part and the residual connection around it too. Padding that an
    ``attention_mask`` of the model's call marks stays out of the query norms' statistics. Evaluated with its running
    statistics, a token's output depends on no later token, so caches work.

    Args:
        model: with blocks whose feed-forward parts are found (see `find_sites`).
        blocks: paths or indices; ``all``; None for the middle block, as in the paper.
        num_experts, heads, top_k, query_dim: see `ProductKeyRouter`.
        seed: of the first weights.
        copy: leave `model` alone; the result shares the tensors that stay. False changes it.
        settings: further arguments of `PEER`.

    Returns:
        The model, and the paths of the new layers.

    Raises:
        InputError: a setting outside its range, an unknown block, or a part that is a `PEER` layer already.
        TypeError: no blocks, or a chosen block without a feed-forward part that can be replaced.
    """
    every = chosen_blocks(model, None)
    chosen = chosen_blocks(model, None if blocks == "all" else [every[len(every) // 2]] if blocks is None else blocks)
    sites = _sites_in(model, chosen)
    generator = torch.Generator().manual_seed(seed)
    made = {
        site.path: PEER(site.dim, num_experts, heads, top_k, query_dim, generator=generator, **settings)
        for site in sites
    }
    result = structure_copy(model) if copy else model
    for site in sites:
        old = result.get_submodule(site.path)
        like = result.get_submodule(site.layers[-1]).weight
        assert isinstance(like, Tensor)
        layer = made[site.path].to(device=like.device, dtype=like.dtype)
        result.set_submodule(site.path, layer.train(old.training))
        for number, path in enumerate(site.passed):
            result.set_submodule(path, PassOn("" if number else site.path).train(old.training))
    find_peers(result)
    return result, tuple(made)


def find_peers(model: nn.Module) -> dict[str, PEER]:
    """The `PEER` layers of `model` by path, in its order; links them, so that they are told which tokens are padding.

    A loaded model is linked by this too.
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, PEER)}
    if not found:
        return found
    calls = next(iter(found.values())).calls
    if calls.hook is None:
        calls = AdaptiveCalls()
        calls.follow(model)
    for layer in found.values():
        layer.calls = calls
    return found


def _sites_in(model: nn.Module, blocks: Sequence[str]) -> list[Site]:
    """The one feed-forward part of each block."""
    held = [path for path, module in model.named_modules() if isinstance(module, PEER)]
    for block in blocks:
        if any(path.startswith(f"{block}.") for path in held):
            raise InputError(f"blocks: {block} has a PEER layer already; choose other blocks, or swap the original")
    try:
        sites = find_sites(model, "mlp")
    except TypeError:
        sites = ()
    found = []
    for block in blocks:
        own = [site for site in sites if site.path.startswith(f"{block}.")]
        if len(own) != 1:
            raise TypeError(f"blocks: {block} has {len(own)} feed-forward parts that can be replaced, expected one")
        found += own
    return found
