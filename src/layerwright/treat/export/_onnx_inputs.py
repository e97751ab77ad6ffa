"""What a model is traced with: example inputs, and which of their sizes may vary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import CheckpointError

__all__ = ["Traced", "example"]

_SAMPLES, _TOKENS, _PIXELS = 2, 8, 64


class Traced(nn.Module):
    """A model as a function of tensors in a fixed order, that returns its logits."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.cached = "input_ids" in names

    def forward(self, *inputs: Tensor) -> Tensor:
        """`inputs` as `example` orders them."""
        settings: dict[str, Any] = {"use_cache": False} if self.cached else {}
        output = self.model(**dict(zip(self.names, inputs, strict=True)), **settings)
        return output.logits  # type: ignore[no-any-return]


def example(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs by name, and the axes of each that may vary.

    Token models take ``input_ids`` and ``attention_mask`` ``(batch, tokens)``, vision models ``pixel_values``
    ``(batch, channels, height, width)``; height and width vary where the configuration does not fix them.

    Raises:
        CheckpointError: a model of another kind.
    """
    config: Any = getattr(model, "config", None)
    batch = torch.export.Dim("batch")
    if config is not None and getattr(config, "vocab_size", None) and not config.is_encoder_decoder:
        longest = getattr(config, "max_position_embeddings", None) or 1 << 20
        ids = torch.arange(_SAMPLES * _TOKENS).view(_SAMPLES, _TOKENS) % config.vocab_size
        token_axes = {0: batch, 1: torch.export.Dim("tokens", max=longest)}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {
            "input_ids": token_axes,
            "attention_mask": token_axes,
        }
    if config is not None and getattr(config, "num_channels", None):
        size = getattr(config, "image_size", None)
        height, width = size if isinstance(size, list | tuple) else (size or _PIXELS, size or _PIXELS)
        axes: dict[int, Any] = {0: batch}
        if size is None:
            axes |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
        return {"pixel_values": torch.zeros(_SAMPLES, config.num_channels, height, width)}, {"pixel_values": axes}
    raise CheckpointError(
        f"onnx cannot express {name}: expected a transformers model from tokens or pixels to logits; use --format "
        "safetensors, or torch.onnx.export with inputs of your own"
    )
