"""PatchConvNet: convolutions at one resolution and width, and attention that gathers the class from all positions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwright.core.errors import CheckpointError, InputError
from layerwright.models.backbone import Rule, check_images, named_config
from layerwright.nn.learned_aggregation import ClassAttentionHead
from layerwright.nn.patch_conv_block import PatchConvBlock

__all__ = ["OFFICIAL_RULES", "PatchConvNet", "official_state"]

_CONFIGS: dict[str, dict[str, Any]] = {
    "s60": {"dim": 384, "depth": 60, "layer_scale": 1e-4},
    "s120": {"dim": 384, "depth": 120},
    "b60": {"dim": 768, "depth": 60},
    "b120": {"dim": 768, "depth": 120},
    "l60": {"dim": 1024, "depth": 60},
    "l120": {"dim": 1024, "depth": 120},
    "s60_multi": {"dim": 384, "depth": 60, "layer_scale": 1e-4, "per_class": True},
    "test": {"dim": 48, "depth": 4, "num_classes": 10, "layer_scale": 1e-4},
}
_BLOCK = r"^(blocks\.\d+)\."
OFFICIAL_RULES: tuple[Rule, ...] = (
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^norm\.", "head.norm."),
    (r"^cls_token$", "head.aggregation.queries"),
    (r"^patch_embed\.proj\.(\d)\.0\.", r"stem.\1."),
    (_BLOCK + r"norm1\.", r"\1.norm."),
    (_BLOCK + r"attn\.qkv_pos\.0\.", r"\1.pwconv1."),
    (_BLOCK + r"attn\.qkv_pos\.2\.", r"\1.dwconv."),
    (_BLOCK + r"attn\.qkv_pos\.4\.conv_(reduce|expand)\.", r"\1.squeeze.\2."),
    (_BLOCK + r"attn\.qkv_pos\.5\.", r"\1.pwconv2."),
    (_BLOCK + r"gamma_1$", r"\1.layer_scale"),
    (r"^blocks_token_only\.0\.attn\.([qkv])\.", r"head.aggregation.\1_proj."),
    (r"^blocks_token_only\.0\.attn\.proj\.", "head.aggregation.o_proj."),
    (r"^blocks_token_only\.0\.mlp\.", "head.aggregation."),
    (r"^blocks_token_only\.0\.gamma_([12])$", r"head.aggregation.layer_scale_\1"),
    (r"^blocks_token_only\.0\.", "head.aggregation."),
)
"""From the names of the authors' checkpoints to those of `PatchConvNet`; see `official_state` for ``s60_multi``."""


class PatchConvNet(nn.Module):
    """A stem of 3 x 3 convolutions with stride 2, `depth` `PatchConvBlock`, and a `ClassAttentionHead`.

    Columnar: after the stem all maps have `dim` channels and one size, whatever the height and width of the pictures. No
    embedding of positions. Its weights of attention are maps of what it looked at; see
    `layerwright.explain.aggregation_map.aggregation_maps`.

    Source: Touvron et al., "Augmenting Convolutional networks with attention-based aggregation" (2021, arXiv
    2112.13692). Training there: 400 epochs of LAMB with strong augmentation.

    Args:
        dim: channels; the stem has a half, a quarter and so on of them before.
        depth: blocks.
        num_classes: at least 1.
        in_channels: of the pictures.
        per_class: a query, and so a map, for each class.
        num_heads: of the aggregation.
        mlp_ratio: hidden channels over channels in the aggregation.
        layer_scale: first values of the scales of all branches.
        drop_path_rate: of every block, the same; the aggregation drops nothing.
        stride: of the stem, a power of two of at least 2; 16 in the published networks.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        per_class: bool = False,
        num_heads: int = 1,
        mlp_ratio: float = 3.0,
        layer_scale: float = 1e-6,
        drop_path_rate: float = 0.0,
        stride: int = 16,
    ) -> None:
        super().__init__()
        for name, count in (("depth", depth), ("in_channels", in_channels)):
            if count < 1:
                raise InputError(f"{name}: got {count}, expected at least 1")
        if stride < 2 or stride & (stride - 1):
            raise InputError(f"stride: got {stride}, expected a power of two of at least 2")
        if dim < stride // 2:
            raise InputError(f"dim: got {dim}, expected at least {stride // 2} for a stem of stride {stride}")
        self.in_channels, self.num_features = in_channels, dim
        self.feature_strides, self.feature_channels = (stride,), (dim,)
        self.stem = nn.Sequential(*_stem(in_channels, dim, stride))
        self.blocks = nn.Sequential(*(PatchConvBlock(dim, drop_path_rate, layer_scale) for _ in range(depth)))
        self.head: nn.Module = ClassAttentionHead(
            dim, num_classes, per_class, num_heads=num_heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale
        )

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A published network: ``s60``, ``s120``, ``b60``, ``b120``, ``l60``, ``l120``, ``s60_multi``; or ``test``.

        Raises:
            InputError: no such network.
        """
        return cls(**named_config(name, _CONFIGS, changes))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """One map ``(batch, dim, height / stride, width / stride)``, sizes rounded up.

        Raises:
            TypeError, InputError: see `check_images`.
        """
        check_images(images, self.in_channels)
        return [self.blocks(self.stem(images))]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of ``(batch, in_channels, height, width)``."""
        logits: Tensor = self.head(self.forward_features(images)[0])
        return logits

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier of `num_classes` classes, with new queries if each class has one.

        Raises:
            InputError: fewer than one, or a head that is no `ClassAttentionHead`.
        """
        if not isinstance(self.head, ClassAttentionHead):
            raise InputError(
                f"head: is a {type(self.head).__name__}, expected a ClassAttentionHead; replace it yourself"
            )
        self.head.reset_classifier_(num_classes)

    def no_weight_decay(self) -> set[str]:
        """The queries."""
        return {name for name, _ in self.named_parameters() if name.endswith(".queries")}


def _stem(in_channels: int, dim: int, stride: int) -> list[nn.Module]:
    """Convolutions without biases, GELU between them."""
    steps = stride.bit_length() - 1
    widths = [in_channels, *(dim >> (steps - 1 - step) for step in range(steps))]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.GELU()]
    return layers[:-1]


def official_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official checkpoint whose classifiers of single classes are one matrix, as `OFFICIAL_RULES` expect.

    Checkpoints with one classifier come back as they are.

    Args:
        state: names and tensors of ``s60_multi``: ``head.0.weight`` ``(1, dim)``, ``head.0.bias`` ``(1,)`` and so on.

    Raises:
        CheckpointError: a class is missing.
    """
    rest: dict[str, Tensor] = {}
    single: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if found := re.fullmatch(r"head\.(\d+)\.(weight|bias)", name):
            single.setdefault(found[2], {})[int(found[1])] = tensor
        else:
            rest[name] = tensor
    for part, tensors in single.items():
        if missing := sorted(set(range(max(tensors) + 1)) - set(tensors)):
            raise CheckpointError(f"state: head.{missing[0]}.{part} is missing")
        rest[f"head.{part}"] = torch.cat([tensors[number] for number in range(len(tensors))])
    return rest
