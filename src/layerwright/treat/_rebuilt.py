"""Compare a model with what its changed configuration would build."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerwright.core.errors import InputError

__all__: list[str] = []

INDEX_NAMES = ("layer_idx", "layer_index", "layer_id", "layer_num", "layer_number", "block_idx", "block_index")
"""Attributes that hold the index of the block a module stands in."""

_TRAINING_ONLY = ("p", "drop_prob", "drop_path_rate", "layerdrop", "training")


def rebuild(model: nn.Module) -> nn.Module:
    """`model` as its saved configuration would build it, on the meta device.

    Raises:
        InputError: it is no model of transformers, or its configuration builds none.
    """
    config = getattr(model, "config", None)
    if not hasattr(type(model), "_from_config") or not hasattr(config, "to_dict"):
        raise InputError(f"{type(model).__name__} cannot be built from a configuration alone")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return type(model)(type(config).from_dict(config.to_dict()))  # type: ignore[union-attr]
    except Exception as error:  # whatever foreign code raises means the same: this configuration builds no model
        raise InputError(f"the configuration of {type(model).__name__} builds no model ({error})") from error


@dataclass(frozen=True)
class Difference:
    """How a model rebuilt from the new configuration differs from the one whose blocks were arranged.

    Attributes:
        outside: names of parameters outside the stacks whose shapes change with the depth.
        inside: what differs in the blocks, as ``name: arranged -> rebuilt``.
        attributes: ``(module path, attribute, arranged, rebuilt)`` outside the stacks.
    """

    outside: tuple[str, ...]
    inside: tuple[str, ...]
    attributes: tuple[tuple[str, str, Any, Any], ...]


def compare(arranged: nn.Module, rebuilt: nn.Module, stacks: Sequence[str]) -> Difference:
    """Compare a rebuilt model whose blocks were arranged with the one that the new configuration builds."""
    outside: list[str] = []
    inside: list[str] = []
    attributes: list[tuple[str, str, Any, Any]] = []
    theirs = dict(rebuilt.named_modules(remove_duplicate=False))
    seen: set[str] = set()
    for path, module in arranged.named_modules():
        other = theirs.get(path)
        seen.add(path)
        changed = _changed_attributes(module, other) if other is not None else []
        if path and any(path.startswith(f"{stack}." if stack else "") for stack in stacks):
            inside += _changed_shapes(path, module, other)
            inside += [f"{path}.{name}: {a} -> {b}" for name, a, b in changed if name not in INDEX_NAMES]
        else:
            outside += _changed_shapes(path, module, other)
            attributes += [(path, name, a, b) for name, a, b in changed]
    for path in theirs:
        if path not in seen and path.rpartition(".")[0] in stacks:
            inside.append(f"{path}: none -> one more block")
    return Difference(tuple(outside), tuple(inside), tuple(attributes))


def _changed_shapes(path: str, module: nn.Module, other: nn.Module | None) -> list[str]:
    own = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    theirs = {} if other is None else {n: tuple(p.shape) for n, p in other._parameters.items() if p is not None}
    names = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
    return [f"{path}.{name}: {own.get(name)} -> {theirs.get(name)}" for name in names]


def _changed_attributes(module: nn.Module, other: nn.Module) -> list[tuple[str, Any, Any]]:
    """Plain settings that differ, save those that act in training only."""
    plain = (bool, int, float, str, tuple, type(None))
    return [
        (name, value, vars(other)[name])
        for name, value in vars(module).items()
        if isinstance(value, plain)
        and isinstance(vars(other).get(name, module), plain)
        and value != vars(other)[name]
        and not name.startswith("_")
        and name not in _TRAINING_ONLY
    ]
