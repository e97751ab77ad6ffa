"""Who speaks? A small network over mel spectra, whose inner features say how alike two voices are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models._tacotron_encoder import MaskedConv, drawn_from, length_mask

__all__ = ["SpeakerClassifier"]


class SpeakerClassifier(nn.Module):
    """Two convolutions over time, mean and deviation over real frames (Snyder et al., 2018, x-vectors), two layers.

    Args:
        bins: of a mel spectrum.
        speakers: number of them, from 2.
        dim: of convolutions and embedding.
        generator: of the first weights; seed 0 if left out.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(self, bins: int, speakers: int, dim: int = 32, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if bins < 1 or speakers < 2 or dim < 1:
            raise InputError(f"got bins={bins}, speakers={speakers}, dim={dim}, expected from 1, 2 and 1")
        self.bins = bins
        with drawn_from(generator):
            self.first, self.second = MaskedConv(bins, dim, 5), MaskedConv(dim, dim, 5)
            self.embedding, self.outer = nn.Linear(2 * dim, dim), nn.Linear(dim, speakers)

    def embed(self, mel: Tensor, mel_lengths: Tensor) -> Tensor:
        """Features of voices ``(batch, dim)``, of spectra ``(batch, frames, bins)``.

        Raises:
            InputError: another shape, or a length out of range.
        """
        if mel.dim() != 3 or mel.shape[2] != self.bins:
            raise InputError(f"mel: got shape {tuple(mel.shape)}, expected (batch, frames, {self.bins})")
        lengths = mel_lengths.to(mel.device)
        mask = length_mask(lengths, mel.shape[1])
        x = self.first(mel * mask[..., None], mask).relu()
        x = self.second(x, mask).relu()
        mean = x.sum(1) / lengths[:, None]
        spread = (((x - mean[:, None]) * mask[..., None]).square().sum(1) / lengths[:, None] + 1e-5).sqrt()
        features: Tensor = self.embedding(torch.cat((mean, spread), 1))
        return features

    def forward(self, mel: Tensor, mel_lengths: Tensor) -> Tensor:
        """Logits ``(batch, speakers)`` of spectra ``(batch, frames, bins)``."""
        logits: Tensor = self.outer(self.embed(mel, mel_lengths).relu())
        return logits
