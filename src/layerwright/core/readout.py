"""The readout of a classifier: the last linear layer, which gives the logits."""

from __future__ import annotations

import torch
from torch import nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import list_layers

__all__ = ["find_readout", "new_readout"]


def find_readout(model: nn.Module, override: str | None = None) -> str:
    """Path of the linear layer of `model` that gives the logits.

    Args:
        model: a classifier.
        override: its path, where it is not found by itself.

    Raises:
        InputError: none or several were found, or `override` is no linear layer of `model`.
    """
    modules = dict(model.named_modules())
    if override is not None and override not in modules:
        raise unknown_name("path", override, modules, "head")
    found = [ref.path for ref in list_layers(model) if ref.kind == "head"] if override is None else [override]
    if len(found) != 1:
        listed = f"found {', '.join(found)}" if found else "found none"
        raise InputError(f"head: {listed} in {type(model).__name__}; name the linear layer of the logits with head=")
    if not isinstance(modules[found[0]], nn.Linear):
        kind = type(modules[found[0]]).__name__
        raise InputError(f"head: {found[0]} is a {kind}, expected the nn.Linear that gives the logits")
    return found[0]


def new_readout(layer: nn.Linear, classes: int, seed: int = 0) -> nn.Linear:
    """An untrained linear layer with the inputs, dtype and device of `layer`; the same weights for the same seed.

    Raises:
        InputError: fewer than two classes.
    """
    if classes < 2:
        raise InputError(f"classes: got {classes}, expected at least 2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(layer.in_features, classes)
    return head.to(layer.weight.device, layer.weight.dtype)
