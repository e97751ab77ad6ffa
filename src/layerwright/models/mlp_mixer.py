"""MLP-Mixer: patches mixed along tokens and channels by perceptrons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models.backbone import check_images, named_config
from layerwright.nn.mixer_block import MixerBlock

__all__ = ["MLPMixer"]

_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "s16": {"channels": 512, "depth": 8, "token_hidden": 256, "channel_hidden": 2048},
    "b16": {"channels": 768, "depth": 12, "token_hidden": 384, "channel_hidden": 3072},
    "l16": {"channels": 1024, "depth": 24, "token_hidden": 512, "channel_hidden": 4096},
    "test": {"image_size": 32, "patch": 8, "channels": 24, "depth": 2, "token_hidden": 16, "channel_hidden": 48},
}


class MLPMixer(nn.Module):
    """Patch embedding, mixer blocks, LayerNorm, mean over tokens, classifier (Tolstikhin et al., 2021, arXiv 2105.01601).

    Mixing along tokens binds the network to one image size.

    Args:
        image_size, patch: in pixels; the patch divides the image.
        channels: of every token.
        depth: blocks.
        token_hidden, channel_hidden: widths within a block.
        num_classes: at least 1.
        in_channels: of the images.

    Raises:
        InputError: a patch that does not divide the image, or sizes below 1.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch: int = 16,
        channels: int = 512,
        depth: int = 8,
        token_hidden: int = 256,
        channel_hidden: int = 2048,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if patch < 1 or image_size % patch:
            raise InputError(f"patch: got {patch}, expected a divisor of the image size {image_size}")
        if num_classes < 1 or depth < 1:
            raise InputError(f"num_classes, depth: got {num_classes} and {depth}, expected at least 1")
        self.image_size, self.in_channels = image_size, in_channels
        self.num_features = channels
        self.feature_strides, self.feature_channels = (patch,), (channels,)
        self.embed = nn.Conv2d(in_channels, channels, patch, patch)
        tokens = (image_size // patch) ** 2
        self.blocks = nn.Sequential(
            *(
                MixerBlock(tokens, channels, token_hidden=token_hidden, channel_hidden=channel_hidden)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, num_classes)

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A published network, ``s16``, ``b16`` or ``l16``; or ``test``.

        Raises:
            InputError: no such network.
        """
        return cls(**named_config(name, _CONFIGS, changes))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The normalised map ``(batch, channels, height / patch, width / patch)``.

        Raises:
            TypeError, InputError: see `check_images`; another image size.
        """
        check_images(images, self.in_channels, self.image_size)
        if tuple(images.shape[2:]) != (self.image_size, self.image_size):
            raise InputError(
                f"images: got {tuple(images.shape[2:])}, expected {self.image_size} x {self.image_size} pixels"
            )
        maps = self.embed(images)
        tokens = self.norm(self.blocks(maps.flatten(2).mT))
        return [tokens.mT.unflatten(2, maps.shape[2:])]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of ``(batch, in_channels, image_size, image_size)``."""
        logits: Tensor = self.head(self.forward_features(images)[0].mean((2, 3)))
        return logits

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier of `num_classes` classes."""
        self.head = nn.Linear(self.num_features, num_classes).to(self.head.weight)

    def no_weight_decay(self) -> set[str]:
        """None: biases and norms are vectors, which do not decay anyway."""
        return set()
