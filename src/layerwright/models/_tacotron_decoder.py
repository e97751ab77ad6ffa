"""Tacotron 2's decoder: prenet, attention LSTM, attention, decoder LSTM, frames and a stop logit for each step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from layerwright.models._tacotron_attention import LocationSensitiveAttention
from layerwright.models._tacotron_encoder import drop

__all__ = ["Decoded", "Decoder", "FusedLSTM", "Prenet"]

State = tuple[Tensor, Tensor]


class Decoded(NamedTuple):
    """Steps of a decoder.

    Attributes:
        mel: ``(batch, steps * frames_per_step, bins)``.
        stop_logits: ``(batch, steps)``.
        alignments: ``(batch, steps, symbols)``.
        states: of the attention LSTM, ``(batch, steps, lstm_dim)``.
    """

    mel: Tensor
    stop_logits: Tensor
    alignments: Tensor
    states: Tensor


class Prenet(nn.Module):
    """Two layers with dropout that is never off (Tacotron 2 varies its speech so)."""

    def __init__(self, bins: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(bins, dim, bias=False), nn.Linear(dim, dim, bias=False)])
        self.dropout = dropout

    def forward(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Features ``(..., dim)`` of frames ``(..., bins)``."""
        for layer in self.layers:
            x = drop(layer(x).relu(), self.dropout, generator)
        return x


class FusedLSTM(nn.Module):
    """One step of an LSTM with zoneout, its input in parts: one product for what is known of all steps, one for the rest.

    Zoneout (Krueger et al., 2017, arXiv 1606.01305) keeps a random share of the state in training, and mixes old and new
    by that share in evaluation mode.

    Args:
        known: features that are known of all steps ahead.
        fresh: features that a step brings, without the state itself.
        dim: of the state.
        zoneout: share.
    """

    def __init__(self, known: int, fresh: int, dim: int, zoneout: float) -> None:
        super().__init__()
        self.dim, self.zoneout = dim, zoneout
        self.known = nn.Linear(known, 4 * dim)
        self.fresh = nn.Linear(fresh + dim, 4 * dim, bias=False)
        bound = dim**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def start(self, like: Tensor) -> State:
        """The first state, of zeros."""
        return like.new_zeros(len(like), self.dim), like.new_zeros(len(like), self.dim)

    def kept(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """What zoneout keeps of h and c in each step, ``(*shape, 2, dim)`` of 0 and 1; None in evaluation mode."""
        if not (self.training and self.zoneout):
            return None
        kept = torch.empty(*shape, 2, self.dim, device=None if generator is None else generator.device)
        return kept.bernoulli_(self.zoneout, generator=generator).to(like)

    def forward(self, known: Tensor, fresh: Tensor, state: State, kept: Tensor | None) -> State:
        """The next state.

        Args:
            known: what `self.known` makes of the input that is known, ``(batch, 4 dim)``.
            fresh: ``(batch, fresh)``.
            state: h and c, each ``(batch, dim)``.
            kept: of this step, ``(batch, 2, dim)``, or None.
        """
        h, c = state
        gates = torch.addmm(known, torch.cat((fresh, h), 1), self.fresh.weight.T)
        entry, keep, out = gates[:, : 3 * self.dim].sigmoid().chunk(3, 1)
        new_c = torch.addcmul(keep * c, entry, gates[:, 3 * self.dim :].tanh())
        new_h = out * new_c.tanh()
        if kept is not None:
            return torch.lerp(new_h, h, kept[:, 0]), torch.lerp(new_c, c, kept[:, 1])
        if self.zoneout and not self.training:
            return torch.lerp(new_h, h, self.zoneout), torch.lerp(new_c, c, self.zoneout)
        return new_h, new_c


class Decoder(nn.Module):
    """Frames from a memory, `frames_per_step` at a time.

    Args:
        memory_dim: features of the memory.
        bins: of a frame.
        frames_per_step: frames of one step (r).
        prenet_dim, lstm_dim: widths.
        attention: dim, filters and kernel of the attention.
        prenet_dropout, zoneout: shares.
    """

    def __init__(
        self,
        memory_dim: int,
        bins: int,
        frames_per_step: int,
        prenet_dim: int,
        lstm_dim: int,
        attention: tuple[int, int, int],
        prenet_dropout: float,
        zoneout: float,
    ) -> None:
        super().__init__()
        self.bins, self.frames_per_step = bins, frames_per_step
        self.prenet = Prenet(bins, prenet_dim, prenet_dropout)
        self.attention_lstm = FusedLSTM(prenet_dim, memory_dim, lstm_dim, zoneout)
        self.attention = LocationSensitiveAttention(lstm_dim, memory_dim, *attention)
        self.lstm = FusedLSTM(lstm_dim + memory_dim, 0, lstm_dim, zoneout)
        self.frames = nn.Linear(lstm_dim + memory_dim, bins * frames_per_step)
        self.stop = nn.Linear(lstm_dim + memory_dim, 1)

    def forward(self, memory: Tensor, mask: Tensor, mel: Tensor, generator: torch.Generator | None) -> Decoded:
        """With the true frames ``(batch, frames, bins)`` as what was said so far; frames are a multiple of a step's.

        What a step sees of them is the last frame of the step before (Wang et al., 2017). All that does not hang on the
        step before is done for all steps at once: prenet, its share of the gates, all inputs of the decoder LSTM (which
        nothing in front of it reads) and all outputs.
        """
        steps = mel.shape[1] // self.frames_per_step
        last = mel[:, self.frames_per_step - 1 :: self.frames_per_step].transpose(0, 1)
        seen = torch.cat((last.new_zeros(1, *last.shape[1:]), last[:-1]))
        known = self.attention_lstm.known(self.prenet(seen, generator))
        kept = self.attention_lstm.kept((steps, len(memory)), memory, generator)
        attending = _Attending(self, memory, mask)
        found = [attending.step(known[t], None if kept is None else kept[t]) for t in range(steps)]
        states, contexts, weights = (torch.stack(part) for part in zip(*found, strict=True))
        inputs = self.lstm.known(torch.cat((states, contexts), -1))
        kept = self.lstm.kept((steps, len(memory)), memory, generator)
        state, nothing, outputs = self.lstm.start(memory), memory.new_zeros(len(memory), 0), []
        for t in range(steps):
            state = self.lstm(inputs[t], nothing, state, None if kept is None else kept[t])
            outputs.append(state[0])
        return self._said(torch.cat((torch.stack(outputs), contexts), -1), weights, states)

    def infer(
        self,
        memory: Tensor,
        mask: Tensor,
        max_steps: int,
        stop_threshold: float,
        generator: torch.Generator | None,
    ) -> tuple[Decoded, Tensor]:
        """From what it said itself, until all samples have stopped or `max_steps` are over.

        Returns:
            What was said, and in which step each sample stopped, ``(batch,)``; `max_steps` where it did not.
        """
        attending = _Attending(self, memory, mask)
        state, nothing = self.lstm.start(memory), memory.new_zeros(len(memory), 0)
        frame = memory.new_zeros(len(memory), self.bins)
        stopped = torch.full((len(memory),), max_steps, device=memory.device)
        found = []
        for t in range(max_steps):
            known = self.attention_lstm.known(self.prenet(frame, generator))
            query, context, weights = attending.step(known, None)
            state = self.lstm(self.lstm.known(torch.cat((query, context), -1)), nothing, state, None)
            both = torch.cat((state[0], context), -1)
            frame = self.frames(both)[:, -self.bins :]
            found.append((both, weights, query))
            ends = self.stop(both)[:, 0].float().sigmoid() > stop_threshold
            stopped = torch.where(ends & (stopped == max_steps), t, stopped)
            if bool((stopped < max_steps).all()):
                break
        return self._said(*(torch.stack(part) for part in zip(*found, strict=True))), stopped

    def _said(self, outputs: Tensor, weights: Tensor, states: Tensor) -> Decoded:
        frames = self.frames(outputs).transpose(0, 1)
        mel = frames.reshape(frames.shape[0], -1, self.bins)
        return Decoded(mel, self.stop(outputs)[..., 0].T, weights.transpose(0, 1), states.transpose(0, 1))


class _Attending:
    """The attention LSTM and the attention, from step to step."""

    def __init__(self, decoder: Decoder, memory: Tensor, mask: Tensor) -> None:
        self.lstm, self.attention = decoder.attention_lstm, decoder.attention
        self.memory, self.mask = memory, mask
        self.keys, self.filter = self.attention.keys(memory), self.attention.place_filter()
        self.state, self.context = self.lstm.start(memory), memory.new_zeros(len(memory), memory.shape[2])
        self.weights, self.total = (memory.new_zeros(memory.shape[:2]) for _ in range(2))

    def step(self, known: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        self.state = self.lstm(known, self.context, self.state, kept)
        places = torch.stack((self.weights, self.total), 1)
        self.context, self.weights = self.attention(
            self.state[0], self.keys, self.memory, places, self.filter, self.mask
        )
        self.total = self.total + self.weights
        return self.state[0], self.context, self.weights
