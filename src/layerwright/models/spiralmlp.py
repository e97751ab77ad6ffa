"""SpiralMLP: a pyramid of blocks that mix positions by channels read on a spiral."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

from torch import Tensor, nn

from layerwright.core.errors import CheckpointError, InputError
from layerwright.models.backbone import Rule, check_images, load_official_, named_config, start_
from layerwright.nn.classifier_heads import GlobalAvgHead
from layerwright.nn.spiral import SpiralBlock, SpiralFC

__all__ = ["OFFICIAL_RULES", "SpiralMLP", "load_spiralmlp_"]

_NARROW, _WIDE = (64, 128, 320, 512), (96, 192, 384, 768)
_CONFIGS: dict[str, dict[str, Any]] = {
    "b1": {"widths": _NARROW, "depths": (2, 2, 4, 2)},
    "b2": {"widths": _NARROW, "depths": (2, 3, 10, 3)},
    "b3": {"widths": _NARROW, "depths": (3, 4, 18, 3)},
    "b4": {"widths": _NARROW, "depths": (3, 8, 27, 3)},
    "b5": {"widths": _WIDE, "depths": (3, 4, 24, 3)},
    "test": {
        "widths": (16, 24, 32, 48),
        "depths": (1, 1, 2, 1),
        "num_classes": 10,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
    },
}
OFFICIAL_RULES: tuple[Rule, ...] = (
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^stages\.(\d+)\.\d+\.proj\.", r"downsamples.\1."),
    (r"\.norm_([12])\.", r".norm\1."),
    (r"\.attn\.fc_cross\.offset$", ".mixing.cross.offsets"),
    (r"\.attn\.fc_cross\.", ".mixing.cross."),
    (r"\.attn\.fc_self\.", ".mixing.local."),
    (r"\.attn\.reweight\.fc1\.", ".mixing.reweight.0."),
    (r"\.attn\.reweight\.fc2\.", ".mixing.reweight.2."),
    (r"\.attn\.proj\.", ".mixing.proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
    (r"^classifier_head\.", "head.fc."),
)
"""From the names of the authors' checkpoints to those of `SpiralMLP`; see `load_spiralmlp_`."""


class SpiralMLP(nn.Module):
    """A 7 x 7 convolution with stride 4, four stages of `SpiralBlock` with 3 x 3 convolutions between, and a classifier.

    Any height and width from 32. Source: Mu, Ul Tayyab and Chua, "SpiralMLP: A Lightweight Vision MLP Architecture" (2024, arXiv
    2404.00648). Training there: 300 epochs of AdamW at 5e-4, weight decay 0.05.

    Args:
        widths: channels of the stages.
        depths: blocks of each.
        num_classes: at least 1.
        in_channels: of the pictures.
        mlp_ratio: hidden channels over channels.
        dropout, drop_path_rate: the same in all blocks.
        inner_residual: see `SpiralBlock`.
        partitions, a_max, period: see `spiral_offsets`.

    Raises:
        InputError: a number outside its range, or widths and depths of different lengths.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        mlp_ratio: float = 4,
        dropout: float = 0.1,
        drop_path_rate: float = 0.1,
        inner_residual: bool = True,
        partitions: int = 2,
        a_max: int = 7,
        period: float = 32,
    ) -> None:
        super().__init__()
        if len(widths) != len(depths) or not widths or min((*widths, *depths)) < 1:
            raise InputError(
                f"widths, depths: got {tuple(widths)} and {tuple(depths)}, expected as many positive numbers"
            )
        self.in_channels = in_channels
        self.num_features, self.feature_channels = widths[-1], tuple(widths)
        self.feature_strides = tuple(4 * 2**stage for stage in range(len(widths)))
        self.patch_embed = nn.Conv2d(in_channels, widths[0], 7, 4, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    SpiralBlock(width, mlp_ratio, partitions, a_max, period, dropout, drop_path_rate, inner_residual)
                    for _ in range(depth)
                )
            )
            for width, depth in zip(widths, depths, strict=True)
        )
        self.downsamples = nn.ModuleList(nn.Conv2d(inputs, outputs, 3, 2, 1) for inputs, outputs in pairwise(widths))
        self.norm, self.head = nn.LayerNorm(widths[-1]), GlobalAvgHead(widths[-1], num_classes)
        start_(self)

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A published network: ``b1`` to ``b5``; or ``test``.

        Raises:
            InputError: no such network.
        """
        return cls(**named_config(name, _CONFIGS, changes))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Maps ``(batch, channels, height, width)`` at strides 4, 8, 16 and 32.

        Raises:
            TypeError, InputError: see `check_images`.
        """
        check_images(images, self.in_channels, self.feature_strides[-1])
        x, maps = self.patch_embed(images), []
        for number, stage in enumerate(self.stages):
            x = stage(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            maps.append(x)
            if number < len(self.downsamples):
                x = self.downsamples[number](x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of ``(batch, in_channels, height, width)``."""
        last = self.forward_features(images)[-1]
        logits: Tensor = self.head(self.norm(last.permute(0, 2, 3, 1)).mean((1, 2)))
        return logits

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier of `num_classes` classes.

        Raises:
            InputError: fewer than one.
        """
        like = self.head.fc.weight
        self.head = GlobalAvgHead(self.num_features, num_classes)
        start_(self.head)
        self.head.to(like).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """None but norms and biases, which have one dimension."""
        return set()


def load_spiralmlp_(model: SpiralMLP, state: Mapping[str, Tensor]) -> None:
    """Copy an official checkpoint into `model`, in place, with the offsets that it was trained with.

    The authors' code fills the offsets of the first partition alone, and those of the others hold what the memory held,
    which their checkpoints keep; read at such places, the weights give what they were trained to give.

    Raises:
        CheckpointError: see `load_official_`; or offsets that are no whole numbers within the model's radius.
    """
    radius = max(layer.a_max for layer in model.modules() if isinstance(layer, SpiralFC))

    def reshape(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("cross.weight"):
            return tensor.flatten(1)
        if not name.endswith("cross.offsets"):
            return tensor
        whole = tensor.double().round()
        if not bool(((tensor - whole).abs() < 1e-3).all()) or whole.abs().max() > radius:
            raise CheckpointError(
                f"state: {name} holds offsets that are no whole numbers from {-radius} to {radius}; take those of spiral_offsets"
            )
        return whole.long().view(-1, 2)

    load_official_(model, state, OFFICIAL_RULES, reshape=reshape)
