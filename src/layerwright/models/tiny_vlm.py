"""A language model that reads images: features of a vision encoder in the place of placeholder tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["TinyVLM", "image_projector", "merge_image_features"]


def merge_image_features(embeddings: Tensor, features: Tensor, image_mask: Tensor) -> Tensor:
    """Token embeddings with those of placeholders replaced by image features, in order.

    Args:
        embeddings: ``(batch, tokens, hidden)``.
        features: ``(batch, patches, hidden)``.
        image_mask: where the placeholders stand, ``(batch, tokens)``.

    Raises:
        InputError: a sample has more or fewer placeholders than its image has features.
    """
    counts = image_mask.sum(1)
    if image_mask.shape != embeddings.shape[:2] or bool((counts != features.shape[1]).any()):
        raise InputError(
            f"image_mask: got shape {tuple(image_mask.shape)} with {counts.tolist()} placeholders, expected "
            f"{tuple(embeddings.shape[:2])} with {features.shape[1]} in each sample, one for each patch"
        )
    chosen = image_mask[..., None].expand(embeddings.shape)
    return embeddings.masked_scatter(chosen, features.to(embeddings))


def image_projector(vision_size: int, hidden_size: int) -> nn.Sequential:
    """``Linear, GELU, Linear`` from the encoder's width to the language model's (Liu et al., 2023, LLaVA-1.5)."""
    return nn.Sequential(nn.Linear(vision_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))


class TinyVLM(nn.Module):
    """A vision encoder, a projector and a causal language model of transformers.

    Args:
        vision: images ``(batch, channels, height, width)`` to features ``(batch, patches, vision size)``.
        projector: features to ``(batch, patches, hidden)``.
        llm: called with ``inputs_embeds``.
        image_token: id of the placeholder; a sample holds one for each patch.
    """

    def __init__(self, vision: nn.Module, projector: nn.Module, llm: nn.Module, image_token: int) -> None:
        super().__init__()
        self.vision, self.projector, self.llm, self.image_token = vision, projector, llm, image_token

    def embed(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """What the language model reads, ``(batch, tokens, hidden)``.

        Raises:
            InputError: as `merge_image_features`.
        """
        table: Any = self.llm.get_input_embeddings()  # type: ignore[operator]
        features = self.projector(self.vision(pixel_values))
        return merge_image_features(table(input_ids), features, input_ids == self.image_token)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        """The language model's output; its loss where there are `labels` (-100 for tokens that do not count)."""
        return self.llm(inputs_embeds=self.embed(input_ids, pixel_values), labels=labels, **inputs)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, pixel_values: Tensor, **settings: Any) -> Tensor:
        """New tokens ``(batch, new)`` that the language model's ``generate`` gives."""
        generate: Any = self.llm.generate
        result: Tensor = generate(inputs_embeds=self.embed(input_ids, pixel_values), **settings)
        return result
