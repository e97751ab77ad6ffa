"""What a text-to-speech network is trained to lower, over real frames, steps and symbols alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.data.spoken import SpeechBatch

__all__ = ["guided_attention_loss", "real_steps", "speech_losses"]


def real_steps(mel_lengths: Tensor, frames_per_step: int) -> Tensor:
    """Steps of a decoder that say so many frames, ``(batch,)``."""
    return (mel_lengths + frames_per_step - 1).div(frames_per_step, rounding_mode="floor")


def speech_losses(output: Any, batch: SpeechBatch, frames_per_step: int) -> dict[str, Tensor]:
    """Terms ``mel_before``, ``mel_after`` (mean square errors) and ``stop`` (cross-entropy of the last step against all).

    Padding counts nowhere. Source: Shen et al., 2018, arXiv 1712.05884.

    Args:
        output: has ``mel_before`` and ``mel_after`` ``(batch, frames, bins)`` and ``stop_logits (batch, steps)``.
        batch: what should have been said.
        frames_per_step: frames of one step.
    """
    device = output.mel_before.device
    lengths = batch.mel_lengths.to(device)
    mel = batch.mel.to(device).float()
    real = (torch.arange(mel.shape[1], device=device) < lengths[:, None])[..., None]
    count = lengths.sum() * mel.shape[2]
    terms = {
        name: ((getattr(output, name).float() - mel) * real).square().sum() / count
        for name in ("mel_before", "mel_after")
    }
    steps = real_steps(lengths, frames_per_step)
    place = torch.arange(output.stop_logits.shape[1], device=device)
    inside = place < steps[:, None]
    wanted = (place == steps[:, None] - 1).float()
    losses = F.binary_cross_entropy_with_logits(output.stop_logits.float(), wanted, reduction="none")
    terms["stop"] = (losses * inside).sum() / inside.sum()
    return terms


def guided_attention_loss(alignments: Tensor, text_lengths: Tensor, steps: Tensor, width: float = 0.2) -> Tensor:
    """The mean of ``1 - exp(-(n/N - t/T)^2 / (2 width^2))`` under the attention of real steps: how far off the diagonal.

    Source: Tachibana, Uenoyama and Aihara, 2018, arXiv 1710.08969.

    Args:
        alignments: ``(batch, steps, symbols)``, which sum to 1 over symbols.
        text_lengths, steps: real symbols and steps, ``(batch,)``.
        width: of the diagonal, above 0.

    Raises:
        InputError: `width` is not above 0.
    """
    if width <= 0:
        raise InputError(f"width: got {width}, expected above 0")
    device = alignments.device
    t, n = (torch.arange(size, device=device) for size in alignments.shape[1:])
    text_lengths, steps = text_lengths.to(device), steps.to(device)
    away = n[None, None, :] / text_lengths[:, None, None] - t[None, :, None] / steps[:, None, None]
    inside = t[None, :] < steps[:, None]
    penalty = (1 - (-away.square() / (2 * width * width)).exp()) * inside[..., None]
    return (penalty * alignments.float()).sum() / inside.sum()
