"""Tacotron 2's convolutions over padded batches, its encoder and its postnet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from layerwright.core.errors import InputError

__all__ = ["MaskedConv", "Postnet", "TextEncoder", "drawn_from", "drop", "length_mask"]


@contextmanager
def drawn_from(generator: torch.Generator | None) -> Iterator[None]:
    """Modules that are built inside draw their first weights from `generator` (seed 0 if None); nothing else is disturbed."""
    seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def length_mask(lengths: Tensor, most: int) -> Tensor:
    """Which places are real, ``(batch, most)``.

    Raises:
        InputError: a length that is not within 1 to `most`.
    """
    if lengths.dim() != 1 or bool(((lengths < 1) | (lengths > most)).any()):
        raise InputError(f"lengths: got {lengths.tolist()}, expected 1 to {most} for each sample")
    return torch.arange(most, device=lengths.device) < lengths[:, None]


def drop(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """`x` with a random `share` of values set to 0 and the others raised, whatever the mode; see ``nn.Dropout``."""
    if not share:
        return x
    kept = torch.empty(x.shape, device=None if generator is None else generator.device)
    return x * kept.bernoulli_(1 - share, generator=generator).div_(1 - share).to(x)


class MaskedConv(nn.Module):
    """A convolution over time, batch normalisation over real places alone, and zeros behind the end of each sample.

    With it a sample of a padded batch is what it is alone (in evaluation mode), and padding changes no statistics.

    Args:
        inputs, outputs: channels.
        kernel: odd.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``(batch, places, outputs)`` of ``(batch, places, inputs)``, whose padding must be 0."""
        y = self.conv(x.mT).mT
        if not self.training:
            return self.norm(y.mT).mT * mask[..., None]
        place = mask.flatten().nonzero()[:, 0]
        real = self.norm(y.flatten(0, 1).index_select(0, place))
        whole = real.new_zeros(mask.numel(), real.shape[1]).index_copy(0, place, real)
        return whole.view_as(y)


class TextEncoder(nn.Module):
    """Embedding of symbols, convolutions, and an LSTM in both directions.

    Args:
        symbols: number of them; id 0 is padding and comes on top.
        dim: features.
        layers, kernel: of the convolutions.
        dropout: behind each of them, in training.
    """

    def __init__(self, symbols: int, dim: int, layers: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols + 1, dim, padding_idx=0)
        bound = (6 / (symbols + dim)) ** 0.5  # as in Glorot's initialisation
        with torch.no_grad():
            self.embedding.weight[1:].uniform_(-bound, bound)
        self.convs = nn.ModuleList(MaskedConv(dim, dim, kernel) for _ in range(layers))
        self.lstm = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)
        self.dropout = dropout

    def forward(self, text: Tensor, lengths: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """Features ``(batch, symbols, dim)`` of ids ``(batch, symbols)``; 0 behind the end."""
        x = self.embedding(text)
        for conv in self.convs:
            x = drop(conv(x, mask).relu(), self.dropout if self.training else 0, generator)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=text.shape[1])[0]


class Postnet(nn.Module):
    """What five convolutions add to a mel spectrum: tanh behind all but the last.

    Args:
        bins: of the spectrum.
        dim: channels inside.
        layers, kernel: of the convolutions.
        dropout: behind each of them, in training.
    """

    def __init__(self, bins: int, dim: int, layers: int, kernel: int, dropout: float) -> None:
        super().__init__()
        widths = [bins, *[dim] * (layers - 1), bins]
        self.convs = nn.ModuleList(MaskedConv(a, b, kernel) for a, b in pairwise(widths))
        self.dropout = dropout

    def forward(self, mel: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """The residual ``(batch, frames, bins)`` of a spectrum of that shape."""
        x = mel * mask[..., None]
        for number, conv in enumerate(self.convs, 1):
            x = conv(x, mask)
            x = x.tanh() if number < len(self.convs) else x
            x = drop(x, self.dropout if self.training else 0, generator)
        return x
