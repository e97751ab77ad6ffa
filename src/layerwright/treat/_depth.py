"""What else of a model states its depth: configuration keys, per-layer lists, attributes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwright.core.blocks import Blocks

__all__: list[str] = []

_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth", "n_blocks")
_SIDES = {
    "encoder": ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "n_encoder_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers", "n_decoder_layers"),
}
_STAGES = ("depths", "num_blocks", "layers", "layers_per_stage", "depth")
_FIRST = ("first_k_dense_replace", "num_dense_layers")
_LAST = ("num_kv_shared_layers",)
_PER_LAYER = re.compile(r"layer|block|_types?$|_modes?$|pattern|per_")
_INDICES = re.compile(r"(_layers|layer_ids|layer_ind\w+|layer_idx\w*)$")
_FLAGS = ("no_rope_layers",)


@dataclass(frozen=True)
class Arranged:
    """A stack in a new order: its blocks before, and the old index of each block after.

    An index that is not in `order` is a dropped block; one that is there again is a copy.
    """

    stack: Blocks
    order: tuple[int, ...]

    @property
    def before(self) -> int:
        """Number of blocks before."""
        return len(self.stack)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Old indices that are gone."""
        return tuple(index for index in range(self.before) if index not in self.order)

    @property
    def copied(self) -> tuple[int, ...]:
        """Old indices of the blocks that stand in several places."""
        return tuple(index for index in range(self.before) if self.order.count(index) > 1)


def arrange_configs(model: nn.Module, item: Arranged, *, stage: int, every_list: bool) -> None:
    """Write the new depth into every configuration of `model` that states the old one.

    Args:
        model: its configurations are changed in place.
        item: the stack.
        stage: index of the stack among its stages.
        every_list: slice every list of the stack's length, not only those whose name speaks of layers.
    """
    owner = _owner(model, item.stack.path)
    tree = list(_tree(getattr(model, "config", None)))
    configs = [owner] if owner is not None else []
    detached = owner is not None and all(owner is not config for config in tree)
    if detached or owner is None:  # a copy of the model's own configuration: both must agree
        configs += [config for config in tree if owner is None or type(config) is type(owner)]
    for config in configs:
        _arrange(config, item, stage, every_list, alone=detached and config is owner)


def _tree(config: Any) -> Iterator[Any]:
    """`config` and the configurations in it."""
    if config is None or isinstance(config, (dict, list, str)):
        return
    yield config
    for value in list(getattr(config, "__dict__", {}).values()):
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _tree(value)


def _owner(model: nn.Module, path: str) -> Any:
    """The configuration of the nearest module around the stack that has one of its own."""
    while path:
        config = model.get_submodule(path).__dict__.get("config")
        if config is not None:
            return config
        path = path.rpartition(".")[0]
    return model.__dict__.get("config")


def _arrange(config: Any, item: Arranged, stage: int, every_list: bool, alone: bool) -> None:
    if item.stack.role == "stage":
        _arrange_stage(config, item, stage)
        return
    _count(config, item)
    _arrange_outputs(config, item)
    named = _stating(config, _SIDES.get(item.stack.role, ()), item.before)
    if alone or not named:
        named += _stating(config, _DEPTH, item.before)
    for name in named or _guess(config, item):
        _set(config, name, len(item.order))
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and not name.startswith("_") and name != "architectures":
            _set(config, name, _arrange_list(name, value, item, every_list))
        elif isinstance(value, dict) and "layer" in name and value and all(type(key) is int for key in value):
            _set(config, name, _arrange_dict(value, item))
    overrides = getattr(vars(config).get("_heterogeneity_spec"), "per_layer_overrides", None)
    if overrides:  # how transformers stores settings that differ from layer to layer
        config.per_layer_config = _arrange_dict(overrides, item)


def _arrange_stage(config: Any, item: Arranged, stage: int) -> None:
    for name in _STAGES:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and len(value) > stage and value[stage] == item.before:
            _set(config, name, _like(value, [*value[:stage], len(item.order), *value[stage + 1 :]]))
            return


def _stating(config: Any, names: Sequence[str], number: int) -> list[str]:
    """Those of `names` that can be set and hold `number`."""
    settable = [name for name in names if not isinstance(getattr(type(config), name, None), property)]
    return [name for name in settable if type(_read(config, name)) is int and _read(config, name) == number]


def _guess(config: Any, item: Arranged) -> list[str]:
    """A number equal to the old depth that is called like the list, or the only one whose name speaks of layers."""
    names = _stating(config, list(vars(config)), item.before)
    alike = [name for name in names if name == item.stack.path.rpartition(".")[2]]
    speaking = [name for name in names if re.search(r"layers?$|blocks?$|depth|self_attends", name)]
    return alike or (speaking if len(speaking) == 1 else [])


def _arrange_outputs(config: Any, item: Arranged) -> None:
    """The blocks whose outputs a backbone returns: index 0 is the stem, index i the output of block i - 1."""
    names, indices = getattr(config, "stage_names", None), vars(config).get("_out_indices")
    if not isinstance(names, list) or len(names) != item.before + 1 or not indices:
        return
    kept = [sum(index < i % len(names) for index in item.order) for i in indices]
    _set(config, "stage_names", names[: len(item.order) + 1])
    _set(config, "_out_indices", list(dict.fromkeys(kept)))
    _set(config, "_out_features", [names[i] for i in dict.fromkeys(kept)])


def _count(config: Any, item: Arranged) -> None:
    """Counts of the first or the last blocks that differ from the others."""
    for name in (*_FIRST, *_LAST):
        number = _read(config, name)
        if type(number) is int and number > 0:
            counted = range(number) if name in _FIRST else range(item.before - number, item.before)
            _set(config, name, sum(index in counted for index in item.order))


def _arrange_list(name: str, value: Sequence[Any], item: Arranged, every_list: bool) -> Sequence[Any]:
    whole = all(type(v) is int for v in value)
    indices = whole and len(set(value)) == len(value) and all(0 <= v < item.before for v in value)
    full = len(value) == item.before
    if _INDICES.search(name) and indices and name not in _FLAGS and (not full or sorted(value) == [*range(len(value))]):
        return _like(value, [new for new, old in enumerate(item.order) if old in value])
    if full and (every_list or _PER_LAYER.search(name)):
        return _like(value, [value[index] for index in item.order])
    return value


def _like(value: Sequence[Any], items: list[Any]) -> Sequence[Any]:
    return tuple(items) if isinstance(value, tuple) else items


def _arrange_dict(value: Mapping[int, Any], item: Arranged) -> dict[int, Any]:
    return {new: value[old] for new, old in enumerate(item.order) if old in value}


def _read(config: Any, name: str) -> Any:
    """An attribute, None where there is none or where it has no one value for all layers."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _set(config: Any, name: str, value: Any) -> None:
    if _read(config, name) != value:
        object.__setattr__(config, name, value) if _frozen(config) else setattr(config, name, value)


def _frozen(config: Any) -> bool:
    return bool(getattr(getattr(type(config), "__dataclass_params__", None), "frozen", False))


def set_depth(model: nn.Module, item: Arranged) -> None:
    """Write the new depth into the attributes of the modules around the stack that state the old one."""
    path = item.stack.path
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        for name in _DEPTH:
            if type(vars(module).get(name)) is int and vars(module)[name] == item.before:
                setattr(module, name, len(item.order))


def align_cache(model: nn.Module, depth: int) -> None:
    """Let `generate` make a cache for all `depth` layers of the decoder where the encoder has fewer.

    transformers takes the depth from `num_hidden_layers` of the decoder's view on the configuration, which in T5 and
    its kin is that of the encoder, unless the configuration has a `decoder_layers`.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(config, "get_text_config"):
        return
    seen = _read(config.get_text_config(decoder=True), "num_hidden_layers")
    if type(seen) is int and seen < depth:
        config.decoder_layers = depth
