"""How many tokens and channels a mixing layer should have for its connections."""

from __future__ import annotations

from layerwright.core.errors import InputError

__all__ = ["effective_width", "mixer_connections", "optimal_mixer_sizes"]


def effective_width(tokens: int, channels: int) -> int:
    """Width ``tokens * channels`` of the sparse perceptron that a mixer is (Hayase and Karakida, 2024, arXiv 2306.01470)."""
    return tokens * channels


def mixer_connections(tokens: int, channels: int, expansion: float | None = None) -> float:
    """Weights of that perceptron that are not zero, for one block.

    ``S C (S + C)`` for a pair of mixings without widths within; ``2 g S C (S + C)`` for a whole block of expansion `g`.
    """
    pair = tokens * channels * (tokens + channels)
    return pair if expansion is None else 2 * expansion * pair


def optimal_mixer_sizes(connections: float, expansion: float | None = None) -> tuple[int, int]:
    """The tokens and channels of the greatest effective width that keep to `connections`: as equal as they can be.

    Of equal widths the pair with fewer connections.

    Raises:
        InputError: fewer connections than one token of one channel has.
    """
    least = mixer_connections(1, 1, expansion)
    if connections < least:
        raise InputError(
            f"connections: got {connections:g}, expected at least {least:g}, those of one token and channel"
        )
    pair = connections / (1 if expansion is None else 2 * expansion)
    best = (1, 1)
    # With S <= C, 2 S^3 <= S C (S + C) bounds S.
    for tokens in range(1, int((pair / 2) ** (1 / 3) + 1e-9) + 1):
        channels = int((-tokens + (tokens**2 + 4 * pair / tokens) ** 0.5) / 2 + 1e-9)
        if channels < tokens or mixer_connections(tokens, channels) > pair * (1 + 1e-12):
            continue
        key, old = ((s * c, -s * c * (s + c)) for s, c in ((tokens, channels), best))
        if key > old:
            best = (tokens, channels)
    return best
