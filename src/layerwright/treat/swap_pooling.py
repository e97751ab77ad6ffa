"""Pooling by attention beside, or in place of, the global pooling of a convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.capture import watch_outputs
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import structure_copy
from layerwright.nn.learned_aggregation import LearnedAggregation

__all__ = ["AggregatedPool", "swap_pooling"]


class AggregatedPool(nn.Module):
    """``pool(x) + gate * aggregation(x)`` with a gate of zeros at first, one for each channel; without `keep_pool` the second
    alone.

    Args:
        pool: from ``(batch, channels, height, width)`` to ``(batch, channels, 1, 1)`` or ``(batch, channels)``, which is
            the shape that comes back too.
        aggregation: from such a map to one token ``(batch, 1, channels)``.
        channels: of the map.
        keep_pool: see above.
    """

    def __init__(self, pool: nn.Module, aggregation: nn.Module, channels: int, keep_pool: bool = True) -> None:
        super().__init__()
        self.pool, self.aggregation = pool, aggregation
        self.gate = nn.Parameter(torch.zeros(channels)) if keep_pool else None

    def forward(self, x: Tensor) -> Tensor:
        """One value for each channel, in the shape that `pool` gives."""
        pooled: Tensor = self.pool(x)
        token: Tensor = self.aggregation(x)
        if self.gate is None:
            return token.reshape(pooled.shape)
        return pooled + (self.gate * token).reshape(pooled.shape)


def _aggregation(channels: int) -> LearnedAggregation:
    # The gate does what small scales are for.
    return LearnedAggregation(channels, layer_scale=1.0)


def swap_pooling(
    model: nn.Module,
    name: str,
    data: Any,
    head: Callable[[int], nn.Module] = _aggregation,
    *,
    keep_pool: bool = True,
    copy: bool = True,
) -> nn.Module:
    """A model whose global pooling `name` also gathers by attention; it answers as before until it is trained on.

    The old pool stays, and the aggregation is added through a gate that starts at zero, so that the classifier behind it
    sees what it was trained for. `layerwright.explain.aggregation_map.aggregation_maps` shows where the trained result
    looks.

    Source: Touvron et al., "Augmenting Convolutional networks with attention-based aggregation" (2021, arXiv
    2112.13692); the gate is an addition.

    Args:
        model: stays as it is; the result shares all other tensors with it.
        name: path of a module that pools all positions of a map, such as ``nn.AdaptiveAvgPool2d(1)``.
        data: one batch is run to see the channels.
        head: ``head(channels)`` makes the aggregation, from a map to one token of as many channels.
        keep_pool: False gives the aggregation alone, as in the paper; the classifier must then be trained anew.
        copy: False changes `model` itself.

    Raises:
        InputError: no such pooling module, one that does not run, that leaves more than one position, or that serves maps of
            different channels, or a head that gives something else.
    """
    pools = {path: module for path, module in model.named_modules() if path and _pools(module)}
    if name not in pools:
        raise _no_pool(model, name, list(pools))
    maps = _run(model, data, name)
    channels = maps[0].shape[1]
    old = pools[name]
    aggregation = head(channels).to(device=maps[0].device, dtype=maps[0].dtype)
    with torch.no_grad(), evaluating(aggregation):
        token = aggregation(maps[0])
    if not isinstance(token, Tensor) or token.shape != (len(maps[0]), 1, channels):
        shape = tuple(token.shape) if isinstance(token, Tensor) else type(token).__name__
        raise InputError(f"head: gives {shape}, expected one token (batch, 1, {channels})")
    result = structure_copy(model) if copy else model
    new = AggregatedPool(result.get_submodule(name), aggregation, channels, keep_pool)
    result.set_submodule(name, new.to(device=maps[0].device, dtype=maps[0].dtype).train(old.training))
    return result


def _pools(module: nn.Module) -> bool:
    return "pool" in type(module).__name__.lower() and not isinstance(module, AggregatedPool)


def _no_pool(model: nn.Module, name: str, candidates: list[str]) -> InputError:
    found = dict(model.named_modules()).get(name) if name else None
    if not candidates:
        return InputError(f"name: got {name!r}, but the model has no pooling module")
    if found is None:
        return unknown_name("pooling module", name, candidates)
    return InputError(f"name: {name} is a {type(found).__name__}, expected one of {', '.join(candidates)}")


def _run(model: nn.Module, data: Any, name: str) -> list[Tensor]:
    """The maps that the pool takes when one batch passes."""
    maps: list[Tensor] = []

    def see(path: str, args: tuple[Any, ...], output: Any) -> None:
        x = args[0]
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise InputError(f"{path}: takes something else than a map (batch, channels, height, width)")
        wanted = tuple(x.shape[:2])
        if not isinstance(output, Tensor) or tuple(output.shape) not in (wanted, (*wanted, 1, 1)):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(
                f"{path}: gives {shape}, expected one position (batch, {x.shape[1]}, 1, 1); name a global pool"
            )
        maps.append(x.detach())

    batches = as_calibration(data)
    with torch.no_grad(), evaluating(model), watch_outputs(model, [name], see):
        batches.forward(model, next(iter(batches)))
    if not maps:
        raise InputError(f"name: {name} does not run when the data passes")
    if len({x.shape[1] for x in maps}) > 1:
        raise InputError(
            f"name: {name} pools maps of {sorted({x.shape[1] for x in maps})} channels; give each a pool of its own"
        )
    return maps
