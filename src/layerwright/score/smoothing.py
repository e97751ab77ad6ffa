"""How alike the tokens of a model become with depth: over-smoothing (Wang et al., 2022; Xue et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration, as_calibration, evaluating
from layerwright.core.capture import first_tensor, watch_outputs
from layerwright.core.errors import InputError, NotFiniteError

__all__ = [
    "frequency_profile",
    "hc_ratio",
    "high_frequency_share",
    "pairwise_cosine",
    "smoothing_rate",
    "token_cosine",
]


def high_frequency_share(x: Tensor) -> Tensor:
    """``||X - mean over tokens|| / ||X||`` of token matrices ``(..., tokens, dim)``: 0 where all tokens are one.

    Invariant under scaling and permutation of tokens; ``||X||^2 = ||mean part||^2 + ||rest||^2``. Float32 sums.

    Raises:
        InputError: fewer than 2 tokens.
        NotFiniteError: values that are not finite.
    """
    values = _checked(x)
    rest = values - values.mean(-2, keepdim=True)
    whole = values.square().sum((-2, -1)).sqrt()
    return rest.square().sum((-2, -1)).sqrt() / whole.clamp_min(torch.finfo(whole.dtype).tiny)


def pairwise_cosine(x: Tensor) -> Tensor:
    """Mean cosine of all pairs of different tokens of ``(..., tokens, dim)``, without a product of all with all.

    ``(||sum of unit tokens||^2 - n) / (n (n - 1))``; a token of zeros has cosine 0 with every other.

    Raises:
        InputError: fewer than 2 tokens.
        NotFiniteError: values that are not finite.
    """
    units = nn.functional.normalize(_checked(x), dim=-1)
    tokens = units.shape[-2]
    own = units.square().sum((-2, -1))
    return (units.sum(-2).square().sum(-1) - own) / (tokens * (tokens - 1))


def hc_ratio(
    model: nn.Module,
    data: Calibration | Any,
    *,
    drop_cls: bool = False,
    blocks: str | Sequence[str] | None = None,
) -> dict[str, float]:
    """`high_frequency_share` of what each block gives, mean over samples, by block: what is left of differences between tokens.

    Source: Wang et al., 2022, arXiv 2203.05962. Padding is not told apart: give samples of full length.

    Args:
        model: any model of blocks over tokens ``(batch, tokens, dim)``.
        data: batches.
        drop_cls: leave out the first token.
        blocks: paths of the blocks, if they are not to be found from the structure (see `find_blocks`).

    Raises:
        InputError: no blocks, or fewer than 2 tokens.
        NotFiniteError: features that are not finite.
    """
    return _mean_by_block(model, data, high_frequency_share, drop_cls, blocks)


def token_cosine(
    model: nn.Module,
    data: Calibration | Any,
    *,
    drop_cls: bool = False,
    blocks: str | Sequence[str] | None = None,
) -> dict[str, float]:
    """`pairwise_cosine` of what each block gives, mean over samples, by block: 1 where all tokens point one way.

    Arguments and errors as of `hc_ratio`.
    """
    return _mean_by_block(model, data, pairwise_cosine, drop_cls, blocks)


def frequency_profile(
    model: nn.Module,
    data: Calibration | Any,
    grid: tuple[int, int],
    *,
    drop_cls: bool = False,
    blocks: str | Sequence[str] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Log amplitude of what each block gives at frequencies along the diagonal of the grid of patches, minus that at zero.

    The first value is 0, the last is that of the highest frequency; the more negative, the stronger the low pass.
    Amplitudes are means over samples and features (Park and Kim, 2022, arXiv 2202.06709).

    Args:
        model, data, drop_cls, blocks: as of `hc_ratio`.
        grid: rows and columns of patches; their product is the number of tokens.

    Raises:
        InputError: a grid that does not match the tokens, or smaller than 2 by 2.
        NotFiniteError: features that are not finite.
    """
    rows, columns = grid
    if min(grid) < 2:
        raise InputError(f"grid: got {rows} x {columns}, expected at least 2 x 2 patches")

    def amplitudes(x: Tensor) -> Tensor:
        values = _checked(x)
        if values.shape[-2] != rows * columns:
            hint = "; drop_cls=True leaves out the class token" if values.shape[-2] == rows * columns + 1 else ""
            raise InputError(f"grid: {rows} x {columns} does not match {values.shape[-2]} tokens{hint}")
        spectrum = torch.fft.fft2(values.unflatten(-2, (rows, columns)), dim=(-3, -2)).abs().mean(-1)
        steps = min(rows, columns) // 2 + 1
        share = torch.linspace(0, 0.5, steps, device=spectrum.device)
        return spectrum[..., (share * rows).round().long(), (share * columns).round().long()]

    sums: dict[str, Tensor] = {}
    for name, state in _states(model, data, drop_cls, blocks):
        found = amplitudes(state).double().sum(0)
        sums[name] = sums.get(name, torch.zeros_like(found)) + found
    profiles = {name: total.clamp_min(1e-300).log() for name, total in sums.items()}
    return {name: tuple((logs - logs[0]).tolist()) for name, logs in profiles.items()}


@torch.no_grad()
def smoothing_rate(attn: Tensor, iterations: int = 500, *, tolerance: float = 1e-9, seed: int = 0) -> Tensor:
    """``||(I - 11^T/n) A (I - 11^T/n)||_2`` of attention maps ``(..., n, n)``, by power iteration in float64: ``(...)``.

    The factor by which differences between tokens shrink at least when they are mixed by `A`: ``||HC[A X]|| <= s ||HC[X]||`` for
    maps whose rows sum to 1. At most 1 for doubly stochastic maps, 0 for uniform ones.

    Args:
        attn: rows sum to 1.
        iterations: at most, at least 1.
        tolerance: relative change at which it stops.
        seed: of the first vectors.

    Raises:
        InputError: maps that are not square, or of fewer than 2 tokens.
        NotFiniteError: values that are not finite.
    """
    if attn.dim() < 2 or attn.shape[-1] != attn.shape[-2] or attn.shape[-1] < 2:
        raise InputError(f"attn: got shape {tuple(attn.shape)}, expected (..., n, n) with n of 2 or more tokens")
    if iterations < 1:
        raise InputError(f"iterations: got {iterations}, expected at least 1")
    if not bool(torch.isfinite(attn).all()):
        raise NotFiniteError("attn: holds values that are not finite")
    maps = attn.double()
    maps = maps - maps.mean(-1, keepdim=True)
    maps = maps - maps.mean(-2, keepdim=True)
    draw = torch.Generator().manual_seed(seed)
    vector = torch.randn(*maps.shape[:-1], 1, generator=draw, dtype=torch.float64).to(maps.device)
    rate = torch.zeros(maps.shape[:-2], dtype=torch.float64, device=maps.device)
    for _ in range(iterations):
        vector = vector / vector.norm(dim=-2, keepdim=True).clamp_min(1e-300)
        moved = maps @ vector
        before, rate = rate, moved.norm(dim=-2)[..., 0]
        vector = maps.mT @ moved
        if bool(((rate - before).abs() <= tolerance * rate + 1e-15).all()):
            break
    return rate


def _checked(x: Tensor) -> Tensor:
    """`x` in float32 or wider."""
    if x.dim() < 2 or x.shape[-2] < 2:
        raise InputError(f"tokens: got shape {tuple(x.shape)}, expected (..., 2 or more tokens, dim)")
    if not bool(torch.isfinite(x).all()):
        raise NotFiniteError("tokens: features hold values that are not finite; look for NaN in the data or weights")
    return x if x.dtype == torch.float64 else x.float()


def _mean_by_block(
    model: nn.Module,
    data: Calibration | Any,
    measure: Callable[[Tensor], Tensor],
    drop_cls: bool,
    blocks: str | Sequence[str] | None,
) -> dict[str, float]:
    found: dict[str, list[Tensor]] = {}
    for name, state in _states(model, data, drop_cls, blocks):
        found.setdefault(name, []).append(measure(state).double().flatten())
    return {name: math.fsum(torch.cat(parts).tolist()) / sum(map(len, parts)) for name, parts in found.items()}


def _states(
    model: nn.Module, data: Calibration | Any, drop_cls: bool, blocks: str | Sequence[str] | None
) -> Iterator[tuple[str, Tensor]]:
    """Outputs ``(batch, tokens, dim)`` of the blocks of the last stack, batch by batch, without gradients."""
    calibration = as_calibration(data)
    names = find_blocks(model, blocks)[-1].names
    with evaluating(model), torch.no_grad():
        for batch in calibration:
            seen: list[tuple[str, Tensor]] = []
            with watch_outputs(model, names, lambda path, _, output: seen.append((path, first_tensor(output)))):  # noqa: B023
                calibration.forward(model, batch)
            for name, state in seen:
                if state.dim() != 3:
                    raise InputError(f"{name} gives {tuple(state.shape)}, expected (batch, tokens, dim)")
                yield name, state[:, 1:] if drop_cls else state
