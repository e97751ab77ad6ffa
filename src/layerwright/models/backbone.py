"""What all vision backbones have in common: their contract, counts of parameters and operations, official weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from layerwright.core.errors import CheckpointError, InputError
from layerwright.score.costs import count_flops

__all__ = ["Backbone", "check_images", "count_macs", "load_official_", "named_config", "start_", "translate_keys"]

Rule = tuple[str, str]
"""A regular expression for a part of a key, and what stands in its place."""


@runtime_checkable
class Backbone(Protocol):
    """A network from pictures ``(batch, channels, height, width)`` to logits that also gives its maps.

    Any height and width of at least the largest stride will do. ``feature_strides`` and ``feature_channels`` describe
    the maps of `forward_features`, the finest first; a columnar network has one.
    """

    num_features: int
    feature_strides: tuple[int, ...]
    feature_channels: tuple[int, ...]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)``."""

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """A map ``(batch, channels, height, width)`` for each stride."""

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier of `num_classes` classes on the features."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay."""


def check_images(images: Tensor, channels: int, smallest: int = 1) -> None:
    """Refuse what is no batch of pictures for a network.

    Raises:
        TypeError: whole numbers.
        InputError: not ``(batch, channels, height, width)``, or a side below `smallest` pixels.
    """
    if not images.is_floating_point():
        raise TypeError(f"images: got {images.dtype}, expected floating-point numbers; convert and scale them first")
    if images.dim() != 4 or images.shape[1] != channels:
        raise InputError(
            f"images: got shape {tuple(images.shape)}, expected (batch, {channels}, height, width) with {channels} channels"
        )
    if not images.shape[0]:
        raise InputError("images: got an empty batch, expected at least one picture")
    if min(images.shape[2:]) < smallest:
        raise InputError(
            f"images: got {images.shape[2]} x {images.shape[3]} pixels, expected at least {smallest} a side"
        )


def count_macs(model: nn.Module, size: int | tuple[int, int] = 224, channels: int = 3) -> float:
    """Multiply-adds of one picture: convolutions, linear layers and products of matrices, attention too.

    Norms, activations and element-wise products count nothing. Papers print such counts as "FLOPs". Runs once on
    random numbers, or on no numbers at all if the model is on the meta device.
    """
    height, width = (size, size) if isinstance(size, int) else size
    device = next(model.parameters()).device
    images = torch.zeros(1, channels, height, width, device=device)
    return count_flops(model, lambda: model(images))[""] / 2


def named_config(name: str, configs: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the published variant `name`, with `changes`.

    Raises:
        InputError: no such variant; the message lists them.
    """
    if name not in configs:
        raise InputError(f"config: got {name!r}, expected one of {', '.join(configs)}")
    return {**configs[name], **changes}


def start_(model: nn.Module, std: float = 0.02, *, convolutions: bool = False) -> None:
    """First weights of vision transformers: linear layers truncated normal with zero biases, norms one and zero.

    Convolutions keep PyTorch's, unless `convolutions` is set.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) or (convolutions and isinstance(module, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.GroupNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def translate_keys(keys: Sequence[str], rules: Sequence[Rule]) -> dict[str, str]:
    """New names of `keys`: each rule, in order, replaces what its regular expression matches.

    Raises:
        InputError: two keys get one name.
    """
    names: dict[str, str] = {}
    for key in keys:
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        names[key] = name
    if len(set(names.values())) < len(names):
        twice = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
        raise InputError(f"keys: several become {twice[0]}")
    return names


def load_official_(
    model: nn.Module,
    state: Mapping[str, Tensor],
    rules: Sequence[Rule],
    *,
    ignored: str = "",
    reshape: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Copy the weights of an official checkpoint into `model`, in place; all of them or none.

    Args:
        state: names and tensors, such as safetensors give; nothing here opens a file.
        rules: for `translate_keys`, from the official names to the model's.
        ignored: regular expression for official names that have no place here.
        reshape: ``reshape(name, tensor)``, for tensors that are stored in another shape.

    Raises:
        CheckpointError: names are missing or left over, or shapes differ; the message says how many and the first.
    """
    kept = [key for key in state if not (ignored and re.search(ignored, key))]
    names = translate_keys(kept, rules)
    new = {names[key]: reshape(names[key], state[key]) if reshape else state[key] for key in kept}
    own = model.state_dict()
    missing, extra = sorted(own.keys() - new.keys()), sorted(new.keys() - own.keys())
    wrong = [name for name in own if name in new and own[name].shape != new[name].shape]
    if missing or extra or wrong:
        lines = [f"{len(missing)} missing ({missing[0]})"] if missing else []
        lines += [f"{len(extra)} unexpected ({extra[0]})"] if extra else []
        if wrong:
            shapes = f"{tuple(new[wrong[0]].shape)} for {tuple(own[wrong[0]].shape)}"
            lines += [f"{len(wrong)} of another shape ({wrong[0]}: {shapes})"]
        raise CheckpointError(f"state: {'; '.join(lines)}; is it of this variant, with as many classes?")
    model.load_state_dict(new)
