"""Take a sub-network out of an elastic network, as a plain smaller one."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from layerwright.core.layers import structure_copy
from layerwright.nn.elastic import ElasticFFN, ElasticLinear, ElasticStack, FeedForward
from layerwright.nn.subnet import SubnetConfig

__all__ = ["extract_subnet"]

M = TypeVar("M", bound=nn.Module)


def extract_subnet(model: M, config: SubnetConfig) -> M:
    """A plain model that computes what `config` of the elastic `model` does, and owns its weights.

    The `ElasticStack` becomes a list of the blocks that are kept, each `ElasticFFN` a `FeedForward` of its width with the
    dropout of that width. All weights are contiguous copies; `model` is left as it is. Memory: one small model.

    Args:
        model: with one `ElasticStack`.
        config: the blocks and widths.

    Raises:
        TypeError: no stack, or several.
        InputError: a block or width that the model does not have; names the axis.
    """
    small = structure_copy(model)
    paths = [path for path, module in small.named_modules() if isinstance(module, ElasticStack)]
    if len(paths) != 1:
        raise TypeError(f"model: {type(model).__name__} holds {len(paths)} ElasticStack, expected one")
    stack = small.get_submodule(paths[0])
    assert isinstance(stack, ElasticStack)
    stack.activate_(config)
    kept = [stack[index] for index in config.keep]
    for block in kept:
        for path, module in list(block.named_modules()):
            if isinstance(module, ElasticFFN):
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, _plain(module))
    plain = nn.ModuleList(kept).train(stack.training)
    parent, _, name = paths[0].rpartition(".")
    setattr(small.get_submodule(parent), name, plain)
    return copy.deepcopy(small)


def _plain(part: ElasticFFN) -> FeedForward:
    with torch.device("meta"):
        plain = FeedForward(part.outer.out_features, part.active_width, part.dropout_rate)
    plain.inner, plain.outer = _linear(part.inner), _linear(part.outer)
    return plain.train(part.training)


def _linear(layer: ElasticLinear) -> nn.Linear:
    weight, bias = layer.active_tensors()
    plain = nn.Linear(layer.active_in, layer.active_out, bias is not None, device="meta")
    plain.weight = nn.Parameter(
        weight.detach().clone(memory_format=torch.contiguous_format), layer.weight.requires_grad
    )
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), layer.bias.requires_grad)
    return plain.train(layer.training)
