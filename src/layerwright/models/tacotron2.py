"""Tacotron 2 for several speakers: mel spectra from text (Shen et al., 2018, arXiv 1712.05884)."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.models._tacotron_config import TacotronConfig
from layerwright.models._tacotron_decoder import Decoder
from layerwright.models._tacotron_encoder import Postnet, TextEncoder, drawn_from, length_mask

__all__ = ["Tacotron2", "TacotronConfig", "TacotronOutput", "TacotronSpeech"]


class TacotronOutput(NamedTuple):
    """What the network says while it hears the truth.

    Attributes:
        mel_before: ``(batch, frames, bins)`` in front of the postnet; 0 behind the end, as all of these.
        mel_after: behind it.
        stop_logits: ``(batch, steps)``.
        alignments: ``(batch, steps, symbols)``: attention, which sums to 1 over symbols.
        memory: what the attention reads, ``(batch, symbols, encoder_dim)``.
        states: of the attention LSTM, ``(batch, steps, lstm_dim)``.
    """

    mel_before: Tensor
    mel_after: Tensor
    stop_logits: Tensor
    alignments: Tensor
    memory: Tensor
    states: Tensor


class TacotronSpeech(NamedTuple):
    """What the network says by itself.

    Attributes:
        mel: ``(batch, frames, bins)``; 0 behind the end.
        mel_lengths: ``(batch,)``.
        alignments: ``(batch, steps, symbols)``.
        stopped: whether it stopped by itself, ``(batch,)`` bool; False where `max_steps` ended it.
    """

    mel: Tensor
    mel_lengths: Tensor
    alignments: Tensor
    stopped: Tensor


class Tacotron2(nn.Module):
    """Text and a speaker to a mel spectrum.

    A speaker's embedding stands beside every step of the encoder, and a projection makes the memory of both; nothing in
    front of it knows the voice. Speech is random, since the prenet's dropout is always on: give a generator.

    Args:
        config: sizes.
        num_speakers: ids are 0 to `num_speakers` - 1.
        generator: of the first weights; seed 0 if left out.

    Raises:
        InputError: fewer than one speaker.
    """

    def __init__(self, config: TacotronConfig, num_speakers: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if num_speakers < 1:
            raise InputError(f"num_speakers: got {num_speakers}, expected at least 1")
        self.config, self.num_speakers = config, num_speakers
        c = config
        with drawn_from(generator):
            self.encoder = TextEncoder(c.symbols, c.encoder_dim, c.encoder_layers, c.encoder_kernel, c.conv_dropout)
            self.speakers = nn.Embedding(num_speakers, c.speaker_dim)
            self.fusion = nn.Linear(c.encoder_dim + c.speaker_dim, c.encoder_dim)
            attention = c.attention_dim, c.attention_filters, c.attention_kernel
            self.decoder = Decoder(
                c.encoder_dim,
                c.bins,
                c.frames_per_step,
                c.prenet_dim,
                c.lstm_dim,
                attention,
                c.prenet_dropout,
                c.zoneout,
            )
            self.postnet = Postnet(c.bins, c.postnet_dim, c.postnet_layers, c.postnet_kernel, c.conv_dropout)

    def encode(
        self, text: Tensor, text_lengths: Tensor, speaker: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The memory ``(batch, symbols, encoder_dim)``, 0 behind the end of a text.

        Args:
            text: ids ``(batch, symbols)``.
            text_lengths, speaker: ``(batch,)``.
            generator: of dropout, in training.

        Raises:
            InputError: an empty text, an unknown symbol or speaker, or another shape.
        """
        self._check(text, text_lengths, speaker)
        lengths = text_lengths.to(text.device)
        mask = length_mask(lengths, text.shape[1])
        said = self.encoder(text, lengths, mask, generator)
        voice = self.speakers(speaker.to(text.device))[:, None].expand(-1, said.shape[1], -1)
        memory: Tensor = self.fusion(torch.cat((said, voice), -1)) * mask[..., None]
        return memory

    def forward(
        self,
        text: Tensor,
        text_lengths: Tensor,
        mel: Tensor,
        mel_lengths: Tensor,
        speaker: Tensor,
        generator: torch.Generator | None = None,
    ) -> TacotronOutput:
        """What it says where each step hears the true frames before it.

        Args:
            text: ids ``(batch, symbols)``, 0 behind the end.
            text_lengths: ``(batch,)``.
            mel: ``(batch, frames, bins)``.
            mel_lengths, speaker: ``(batch,)``.
            generator: of all dropout.

        Raises:
            InputError: an empty text, an unknown symbol or speaker, another number of bins, or another shape.
        """
        c = self.config
        if mel.dim() != 3 or len(mel) != len(text) or mel.shape[2] != c.bins:
            raise InputError(f"mel: got shape {tuple(mel.shape)}, expected ({len(text)}, frames, {c.bins})")
        memory = self.encode(text, text_lengths, speaker, generator)
        frames = mel.shape[1]
        real = length_mask(mel_lengths.to(mel.device), frames)[..., None]
        whole = F.pad(mel * real, (0, 0, 0, -frames % c.frames_per_step)).to(memory.dtype)
        mask = length_mask(text_lengths.to(text.device), text.shape[1])
        said = self.decoder(memory, mask, whole, generator)
        before = said.mel[:, :frames] * real
        after = before + self.postnet(before, real[..., 0], generator) * real
        return TacotronOutput(before, after, said.stop_logits, said.alignments, memory, said.states)

    @torch.no_grad()
    def infer(
        self,
        text: Tensor,
        speaker: Tensor,
        max_steps: int = 400,
        stop_threshold: float = 0.5,
        generator: torch.Generator | None = None,
        *,
        text_lengths: Tensor | None = None,
    ) -> TacotronSpeech:
        """What it says by itself, in evaluation mode with the prenet's dropout on; the mode is left as it was.

        Warns where `max_steps` ended a sample; `stopped` says which.

        Args:
            text: ids ``(batch, symbols)``.
            speaker: ``(batch,)``.
            max_steps: each says `frames_per_step` frames.
            stop_threshold: probability above which a step is the last one, 0 to 1.
            generator: of the prenet's dropout; seed 0 if left out.
            text_lengths: ``(batch,)``; up to the last id that is not 0 if left out.

        Raises:
            InputError: a number outside its range, or see `encode`.
        """
        if max_steps < 1 or not 0 <= stop_threshold <= 1:
            raise InputError(
                f"max_steps, stop_threshold: got {max_steps}, {stop_threshold}, expected from 1, and 0 to 1"
            )
        if text_lengths is None and text.dim() == 2:
            places = torch.arange(1, text.shape[1] + 1, device=text.device)
            text_lengths = ((text != 0) * places).amax(1) if text.shape[1] else text.new_zeros(len(text))
        mode = self.training
        self.eval()
        try:
            lengths = torch.empty(0) if text_lengths is None else text_lengths
            memory = self.encode(text, lengths, speaker)
            mask = length_mask(lengths.to(text.device), text.shape[1])
            generator = generator or torch.Generator(text.device).manual_seed(0)
            said, ends = self.decoder.infer(memory, mask, max_steps, stop_threshold, generator)
            stopped = ends < max_steps
            if not bool(stopped.all()):
                warnings.warn(
                    f"{int((~stopped).sum())} of {len(text)} did not stop within {max_steps} steps", stacklevel=3
                )
            frames = (ends + 1).clamp(max=max_steps) * self.config.frames_per_step
            real = length_mask(frames, said.mel.shape[1])
            mel = said.mel * real[..., None]
            mel = mel + self.postnet(mel, real, None) * real[..., None]
        finally:
            self.train(mode)
        return TacotronSpeech(mel, frames, said.alignments, stopped)

    def _check(self, text: Tensor, lengths: Tensor, speaker: Tensor) -> None:
        if text.dim() != 2 or text.is_floating_point() or not text.numel():
            raise InputError(f"text: got {text.dtype} of shape {tuple(text.shape)}, expected ids (batch, symbols)")
        if tuple(lengths.shape) != (len(text),) or bool(((lengths < 1) | (lengths > text.shape[1])).any()):
            raise InputError(
                f"text_lengths: got {lengths.tolist()}, expected {len(text)} of 1 to {text.shape[1]}; no text may be empty"
            )
        if int(text.min()) < 0 or int(text.max()) > self.config.symbols:
            raise InputError(
                f"text: got ids {int(text.min())} to {int(text.max())}, expected 1 to {self.config.symbols}, and 0 as padding"
            )
        if speaker.dim() != 1 or len(speaker) != len(text):
            raise InputError(f"speaker: got shape {tuple(speaker.shape)}, expected ({len(text)},)")
        unknown = speaker[(speaker < 0) | (speaker >= self.num_speakers)]
        if len(unknown):
            raise InputError(f"speaker: got {unknown.tolist()}, expected 0 to {self.num_speakers - 1}")
