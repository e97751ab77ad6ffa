"""The parts of an RNN transducer: frames stacked, blocks of state space and feed-forward parts, the predictor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.nn.elastic import ElasticFFN, FeedForward
from layerwright.nn.state_space import MultiHeadSSM

__all__ = ["Predictor", "RNNTBlock", "RNNTOutput", "stack_frames", "start_linear_"]


class RNNTOutput(NamedTuple):
    """What a transducer says of a batch.

    Attributes:
        logits: ``(batch, frames, labels + 1, symbols)``.
        frame_lengths: real frames of each sample, after stacking.
    """

    logits: Tensor
    frame_lengths: Tensor


class RNNTBlock(nn.Module):
    """``x + ssm(norm(x))``, then ``x + ffn(norm(x))``.

    Args:
        dim: features of a frame.
        heads, state_size, bidirectional: see `MultiHeadSSM`.
        widths: inner widths of the feed-forward part that can be chosen, or its only one.
        elastic: whether it can be chosen.
        dropout: of the feed-forward part's inner neurons at its largest width.
        adaptive_dropout: see `ElasticFFN`.
        generator: of the first weights.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        state_size: int,
        bidirectional: bool,
        widths: Sequence[int],
        elastic: bool,
        dropout: float,
        adaptive_dropout: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.ssm_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.ssm = MultiHeadSSM(dim, heads, state_size, bidirectional, generator=generator)
        self.ffn: FeedForward
        if elastic:
            self.ffn = ElasticFFN(dim, widths, dropout, adaptive_dropout)
        else:
            self.ffn = FeedForward(dim, max(widths), dropout)
        start_linear_(self.ffn, generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Frames ``(batch, frames, dim)``; `mask` is True at real ones."""
        x = x + self.ssm(self.ssm_norm(x), mask)
        output: Tensor = x + self.ffn(self.ffn_norm(x))
        return output


class Predictor(nn.Module):
    """An embedding of labels and an LSTM over them; blank's embedding stands at the start.

    Args:
        symbols: labels and blank.
        dim: of the embedding and the LSTM.
        blank: its index.
        generator: of the first weights.
    """

    def __init__(self, symbols: int, dim: int, blank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.blank = blank
        self.embedding = nn.Embedding(symbols, dim, _weight=torch.randn(symbols, dim, generator=generator))
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        for parameter in self.lstm.parameters():
            nn.init.uniform_(parameter, -(dim**-0.5), dim**-0.5, generator=generator)

    def forward(self, targets: Tensor) -> Tensor:
        """Features ``(batch, labels + 1, dim)`` of all prefixes of ``(batch, labels)``."""
        output: Tensor = self.lstm(self.embedding(F.pad(targets, (1, 0), value=self.blank)))[0]
        return output

    def start(self, batch: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Features ``(batch, dim)`` of the empty prefix, and the state behind it."""
        return self.step(torch.full((batch,), self.blank, device=self.embedding.weight.device), None)

    def step(self, label: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Features after one more label ``(batch,)``, and the state behind it."""
        output, state = self.lstm(self.embedding(label)[:, None], state)
        return output[:, 0], state


def stack_frames(features: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` frames beside each other as one, ``(batch, ceil(frames / count), count * channels)``, and new lengths.

    Frames behind a sample's end are zeros.
    """
    real = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
    features = features * real[..., None]
    features = F.pad(features, (0, 0, 0, -features.shape[1] % count))
    stacked = features.reshape(features.shape[0], -1, count * features.shape[2])
    return stacked, (lengths + count - 1).div(count, rounding_mode="floor")


def start_linear_(module: nn.Module, generator: torch.Generator, gain: float = 1.0) -> None:
    """First weights and biases of all linear layers, even within ``gain / sqrt(inputs)``, in place.

    Biases are not zero: ScaledAdam moves a parameter by a share of its size.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -gain * bound, gain * bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def check_features(features: Tensor, lengths: Tensor, channels: int) -> None:
    """Nothing, if the batch can be encoded.

    Raises:
        InputError: another shape, or a length out of range.
    """
    if features.dim() != 3 or features.shape[2] != channels:
        raise InputError(f"features: got shape {tuple(features.shape)}, expected (batch, frames, {channels})")
    if tuple(lengths.shape) != (len(features),) or bool(((lengths < 1) | (lengths > features.shape[1])).any()):
        raise InputError(
            f"feature_lengths: got {lengths.tolist()}, expected {len(features)} of 1 to {features.shape[1]}"
        )
