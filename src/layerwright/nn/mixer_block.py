"""The block of MLP-Mixer: features mixed along tokens, then along channels."""

from __future__ import annotations

from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["MixerBlock"]


class MixerBlock(nn.Module):
    """``X + W2 phi(W1 norm(X))``, then ``X + phi(norm(X) V1) V2``, with GELU (Tolstikhin et al., 2021, arXiv 2105.01601).

    Seen on ``vec(X)``, four layers of width ``expansion * tokens * channels`` whose weights are zero but for a share of
    ``1 / channels`` and ``1 / tokens`` (Hayase and Karakida, 2024, arXiv 2306.01470).

    Args:
        tokens, channels: of ``X``.
        expansion: widths within, as a multiple of tokens and of channels.
        token_hidden, channel_hidden: the widths themselves, instead.
        skip: add what comes in.
        norm: LayerNorm over channels in front of either part.

    Raises:
        InputError: sizes below 1.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        expansion: float = 4.0,
        token_hidden: int | None = None,
        channel_hidden: int | None = None,
        skip: bool = True,
        norm: bool = True,
    ) -> None:
        super().__init__()
        inner = token_hidden or round(expansion * tokens), channel_hidden or round(expansion * channels)
        if min(tokens, channels, *inner) < 1:
            raise InputError(f"tokens, channels: got {tokens}, {channels} with {inner} within, expected at least 1")
        self.skip = skip
        self.norm1, self.norm2 = (nn.LayerNorm(channels) if norm else nn.Identity() for _ in range(2))
        self.token1, self.token2 = nn.Linear(tokens, inner[0]), nn.Linear(inner[0], tokens)
        self.channel1, self.channel2 = nn.Linear(channels, inner[1]), nn.Linear(inner[1], channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, channels)`` to the same."""
        mixed = self.token2(self.act(self.token1(self.norm1(x).mT))).mT
        x = x + mixed if self.skip else mixed
        mixed = self.channel2(self.act(self.channel1(self.norm2(x))))
        return x + mixed if self.skip else mixed
