"""Sizes of a Tacotron 2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from layerwright.core.errors import InputError

__all__ = ["TacotronConfig"]


@dataclass(frozen=True)
class TacotronConfig:
    """Sizes; the defaults are those of the publication.

    Attributes:
        symbols: of texts; ids are 1 to `symbols`, 0 is padding.
        bins: of the mel spectrum.
        encoder_dim: of embedding, convolutions and memory; even.
        encoder_layers, encoder_kernel: convolutions of the encoder.
        speaker_dim: of a speaker's embedding.
        prenet_dim, lstm_dim: widths in the decoder.
        attention_dim, attention_filters, attention_kernel: of the location-sensitive attention.
        postnet_dim, postnet_layers, postnet_kernel: convolutions of the postnet.
        frames_per_step: frames that a step of the decoder says (r).
        conv_dropout: behind convolutions, in training.
        prenet_dropout: always on, in inference too.
        zoneout: of both LSTMs of the decoder.

    Raises:
        InputError: a number outside its range.
    """

    symbols: int
    bins: int = 80
    encoder_dim: int = 512
    encoder_layers: int = 3
    encoder_kernel: int = 5
    speaker_dim: int = 64
    prenet_dim: int = 256
    lstm_dim: int = 1024
    attention_dim: int = 128
    attention_filters: int = 32
    attention_kernel: int = 31
    postnet_dim: int = 512
    postnet_layers: int = 5
    postnet_kernel: int = 5
    frames_per_step: int = 1
    conv_dropout: float = 0.5
    prenet_dropout: float = 0.5
    zoneout: float = 0.1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("conv_dropout", "prenet_dropout", "zoneout"):
                if not 0 <= value < 1:
                    raise InputError(f"{name}: got {value}, expected 0 to below 1")
            elif value < 1 or (name.endswith("kernel") and value % 2 == 0) or (name == "encoder_dim" and value % 2):
                kind = (
                    "an odd number"
                    if name.endswith("kernel")
                    else "an even number"
                    if "encoder" in name
                    else "a number"
                )
                raise InputError(f"{name}: got {value}, expected {kind} from 1")

    @classmethod
    def small(cls, symbols: int, **changes: Any) -> Self:
        """A network that learns short phrases on a CPU within a minute: widths 64 and 128, four frames a step."""
        config = cls(
            symbols, bins=40, encoder_dim=64, speaker_dim=16, prenet_dim=64, lstm_dim=128, attention_dim=64,
            postnet_dim=64, frames_per_step=4,
        )  # fmt: skip
        return replace(config, **changes)
