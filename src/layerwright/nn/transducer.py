"""The joiner of a transducer, and its lattice brought down to three classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError

__all__ = ["TransducerJoiner", "collapse_lattice", "lattice_mask"]

FLOOR = -69.0
"""Log-probability of a label where none is left: e^-69, the same for every network."""


class TransducerJoiner(nn.Module):
    """``z(t, u) = W tanh(P_e h_t + P_p g_u)`` over all labels and blank (Graves, 2012, arXiv 1211.3711).

    Memory: ``batch x frames x (labels + 1) x (joiner width + symbols)``.

    Args:
        encoder_dim: features of a frame.
        predictor_dim: features of a prefix of labels.
        dim: inner width.
        symbols: outputs: the labels and blank.
    """

    def __init__(self, encoder_dim: int, predictor_dim: int, dim: int, symbols: int) -> None:
        super().__init__()
        self.encoder_projection = nn.Linear(encoder_dim, dim)
        self.predictor_projection = nn.Linear(predictor_dim, dim, bias=False)
        self.output = nn.Linear(dim, symbols)

    def forward(self, frames: Tensor, prefixes: Tensor) -> Tensor:
        """Logits ``(batch, frames, prefixes, symbols)`` of ``(batch, frames, encoder_dim)`` and ``(batch, prefixes,
        predictor_dim)``.
        """
        left: Tensor = self.encoder_projection(frames)[:, :, None]
        right: Tensor = self.predictor_projection(prefixes)[:, None]
        logits: Tensor = self.output((left + right).tanh_())
        return logits


def lattice_mask(logits: Tensor, frame_lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """True at the nodes ``(batch, frames, labels + 1)`` of each sample's own lattice."""
    frames = torch.arange(logits.shape[1], device=logits.device) < frame_lengths.to(logits.device)[:, None]
    labels = torch.arange(logits.shape[2], device=logits.device) <= target_lengths.to(logits.device)[:, None]
    return frames[:, :, None] & labels[:, None]


def collapse_lattice(logits: Tensor, targets: Tensor, target_lengths: Tensor, blank: int = 0) -> Tensor:
    """Log-probabilities ``(batch, frames, labels + 1, 3)`` in float32 of the next label, blank, and all the rest.

    What a teacher says of a node then takes three numbers. Where no label is left, the first of them is a constant next
    to nothing. Memory: two tensors of the size of the logits, for the gradient. Source: Panchapagesan et al. (2021),
    arXiv 2011.06110.

    Args:
        logits: ``(batch, frames, labels + 1, symbols)``, of at least 3 symbols.
        targets: labels ``(batch, labels)``; what is behind their end may be anything.
        target_lengths: ``(batch,)``.
        blank: its index.

    Raises:
        InputError: fewer than 3 symbols.
    """
    if logits.shape[-1] < 3:
        raise InputError(f"logits: got {logits.shape[-1]} symbols, expected at least 3 (two labels and blank)")
    logs = logits if logits.dtype == torch.float64 else logits.float()
    targets, target_lengths = targets.to(logits.device), target_lengths.to(logits.device)
    left = torch.arange(targets.shape[1], device=targets.device) < target_lengths[:, None]
    other = 1 if blank == 0 else 0  # any label: where none is left, it is not looked at
    labels = F.pad(torch.where(left, targets, other), (0, 1), value=other)
    index = labels[:, None, :, None].expand(*logs.shape[:3], 1)
    total = logs.logsumexp(-1, keepdim=True)
    label = logs.gather(-1, index)
    live = F.pad(left, (0, 1))[:, None, :, None]
    rest = logs.scatter(-1, index, torch.where(live, float("-inf"), label))
    rest = torch.cat([rest[..., :blank], rest[..., blank + 1 :]], -1).logsumexp(-1, keepdim=True)
    label = torch.where(live, label - total, FLOOR)
    return torch.cat([label, logs[..., blank : blank + 1] - total, rest - total], -1)
