"""CSWin Transformer: four stages of attention in cross-shaped windows whose stripes widen with depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models.backbone import Rule, check_images, named_config, start_
from layerwright.nn.classifier_heads import GlobalAvgHead
from layerwright.nn.cswin_block import CSWinBlock
from layerwright.nn.drop_path import drop_path_rates

__all__ = ["OFFICIAL_RULES", "CSWinTransformer"]

_BASE: dict[str, Any] = {"embed_dim": 96, "depths": (2, 4, 32, 2), "num_heads": (4, 8, 16, 32)}
_LARGE: dict[str, Any] = {"embed_dim": 144, "depths": (2, 4, 32, 2), "num_heads": (6, 12, 24, 24)}
_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 64, "depths": (1, 2, 21, 1), "num_heads": (2, 4, 8, 16)},
    "small": {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)},
    "base": _BASE,
    "large": _LARGE,
    "base_384": {**_BASE, "stripe_widths": (1, 2, 12, 12)},
    "large_384": {**_LARGE, "stripe_widths": (1, 2, 12, 12)},
    "test": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4), "num_classes": 10},
}
OFFICIAL_RULES: tuple[Rule, ...] = (
    (r"^stage1_conv_embed\.0\.", "embeddings.0.conv."),
    (r"^stage1_conv_embed\.2\.", "embeddings.0.norm."),
    (r"^merge(\d)\.", r"embeddings.\1."),
    *((rf"^{kind}{number}\.", f"{ours}.{number - 1}.") for kind, ours in (("stage", "stages"), ("norm", "norms"))
      for number in range(1, 5)),
    (r"^(stages\.\d+\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
    (r"\.attns\.(\d)\.get_v\.", r".attn.lepe.\1.conv."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
    (r"^head\.", "head.fc."),
)  # fmt: skip
"""From the names of the authors' checkpoints, for classification or segmentation, to those of `CSWinTransformer`."""


class CSWinTransformer(nn.Module):
    """A convolutional stem of stride 4, four stages of `CSWinBlock`, and a classifier of the mean over the positions.

    Between stages a 3 x 3 convolution halves the map and doubles the channels; every embedding ends in a layer norm. The
    last stage attends to the whole map. Any height and width of at least 32.

    Source: Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows" (2022, arXiv
    2107.00652). Training there: 300 epochs of AdamW at 2e-3 for batches of 2048 (base: 1e-3, 1024), weight decay 0.05
    (base: 0.1), 20 epochs of warm-up, drop path 0.2, 0.4 and 0.5 for tiny, small and base, a moving average of the weights.

    Args:
        embed_dim: channels of the first stage.
        depths: blocks of the four stages.
        num_heads: of each stage; even but for the last.
        stripe_widths: columns or rows of the stripes of each stage; the last does not count.
        num_classes: at least 1.
        in_channels: of the pictures.
        mlp_ratio: hidden channels over channels.
        drop_path_rate: of the last block; it grows linearly from 0.
        mask_padding: see `window_attention`; False for weights of the authors' segmentation code at sizes that the stripes
            do not tile.
        features_only: no classifier; `forward` gives the maps of the four stages, each behind a layer norm.

    Raises:
        InputError: a number outside its range, or not four of each.
    """

    feature_strides = (4, 8, 16, 32)

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        stripe_widths: Sequence[int] = (1, 2, 7, 7),
        num_classes: int = 1000,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        mask_padding: bool = True,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        for name, values in (("depths", depths), ("num_heads", num_heads), ("stripe_widths", stripe_widths)):
            if len(values) != 4 or min(values) < 1:
                raise InputError(f"{name}: got {tuple(values)}, expected four positive numbers, one for each stage")
        self.in_channels, self.features_only = in_channels, features_only
        widths = tuple(embed_dim * 2**stage for stage in range(4))
        self.feature_channels, self.num_features = widths, widths[-1]
        self.embeddings = nn.ModuleList([_Embedding(in_channels, embed_dim, 7, 4, 2)])
        self.embeddings.extend(_Embedding(width // 2, width, 3, 2, 1) for width in widths[1:])
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    CSWinBlock(width, heads, stripe, mlp_ratio, stage == 3, next(rates), mask_padding)
                    for _ in range(depth)
                )
            )
            for stage, (width, depth, heads, stripe) in enumerate(
                zip(widths, depths, num_heads, stripe_widths, strict=True)
            )
        )
        if features_only:
            self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        else:
            self.norm, self.head = nn.LayerNorm(widths[-1]), GlobalAvgHead(widths[-1], num_classes)
        start_(self)

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A published network: ``tiny``, ``small``, ``base``, ``large``, ``base_384``, ``large_384``; or ``test``.

        Raises:
            InputError: no such network.
        """
        return cls(**named_config(name, _CONFIGS, changes))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Maps ``(batch, channels, height, width)`` at strides 4, 8, 16 and 32; normalised with `features_only`.

        Raises:
            TypeError, InputError: see `check_images`; sides below 32 pixels.
        """
        check_images(images, self.in_channels, self.feature_strides[-1])
        maps, x = [], images
        for number, (embedding, stage) in enumerate(zip(self.embeddings, self.stages, strict=True)):
            rows = stage(embedding(x))
            x = rows.permute(0, 3, 1, 2)
            maps.append(self.norms[number](rows).permute(0, 3, 1, 2) if self.features_only else x)
        return maps

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Logits ``(batch, num_classes)`` of ``(batch, in_channels, height, width)``; maps with `features_only`."""
        maps = self.forward_features(images)
        if self.features_only:
            return maps
        logits: Tensor = self.head(self.norm(maps[-1].permute(0, 2, 3, 1)).mean((1, 2)))
        return logits

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier of `num_classes` classes.

        Raises:
            InputError: fewer than one, or `features_only`.
        """
        if self.features_only:
            raise InputError("num_classes: this network has no classifier; build it with features_only=False")
        like, head = self.head.fc.weight, GlobalAvgHead(self.num_features, num_classes)
        start_(head)
        self.head = head.to(like).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """None but the vectors, which never decay: there are no embeddings of positions."""
        return set()


class _Embedding(nn.Module):
    """A convolution with a stride, then a norm over the channels, which come last from there on."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, inputs, height, width)`` to ``(batch, rows, columns, outputs)``."""
        rows: Tensor = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return rows
