"""Random masks over tokens: which stay, which are masked, and how the order is put back (He et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["RandomMask", "keep_tokens", "mask_of", "random_mask", "restore_tokens"]


@dataclass(frozen=True)
class RandomMask:
    """A mask over `n` tokens for each sample of a batch.

    Attributes:
        ids_keep: places of the visible tokens in the order in which they are handed on, ``(batch, visible)``.
        ids_restore: where each of the `n` tokens stands in the shuffled order, visible ones first, ``(batch, n)``.
        mask: 1 where a token is masked, 0 where it is visible, float32 ``(batch, n)``.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor


def random_mask(
    n_tokens: int,
    ratio: float,
    generator: torch.Generator | None = None,
    *,
    batch: int = 1,
    noise: Tensor | None = None,
    device: torch.device | str | None = None,
) -> RandomMask:
    """Mask a share `ratio` of the tokens of each sample: exactly ``round(n_tokens (1 - ratio))`` stay visible.

    Source: He, Chen, Xie, Li, Dollár and Girshick, 2021, Masked Autoencoders, arXiv 2111.06377.

    Args:
        n_tokens: at least 2.
        ratio: share that is masked, inside (0, 1).
        generator: of the noise.
        batch: samples, each with a mask of its own.
        noise: ``(batch, n_tokens)`` in place of drawn noise; the tokens with the smallest values stay.
        device: of the result, by default that of `noise` or of `generator`.

    Raises:
        InputError: a ratio outside (0, 1), or one that leaves no visible or no masked token; noise of another shape.
    """
    if not 0 < ratio < 1:
        raise InputError(f"mask_ratio: got {ratio}, expected a share inside (0, 1)")
    kept = round(n_tokens * (1 - ratio))
    if not 1 <= kept < n_tokens:
        what = "visible" if kept < 1 else "masked"
        raise InputError(f"mask_ratio: {ratio} of {n_tokens} tokens leaves no {what} token; choose another ratio")
    if noise is None:
        if batch < 1:
            raise InputError(f"batch: got {batch}, expected at least 1")
        made = generator.device if generator is not None else torch.device(device or "cpu")
        noise = torch.rand(batch, n_tokens, generator=generator, device=made)
    elif noise.dim() != 2 or noise.shape[1] != n_tokens:
        raise InputError(f"noise: got shape {tuple(noise.shape)}, expected (batch, {n_tokens})")
    order = noise.to(device or noise.device).argsort(1)
    return _from_order(order, kept)


def mask_of(masked: Tensor) -> RandomMask:
    """The `RandomMask` of a boolean mask ``(batch, n)``, True where masked; visible tokens keep their order.

    Raises:
        InputError: samples with unequal numbers of visible tokens, or with none.
    """
    if masked.dim() != 2:
        raise InputError(f"mask: got shape {tuple(masked.shape)}, expected (batch, tokens)")
    hidden = masked.bool()
    visible = (~hidden).sum(1)
    kept = int(visible[0])
    if not bool((visible == kept).all()):
        raise InputError(f"mask: samples have {sorted(set(visible.tolist()))} visible tokens, expected equal numbers")
    if kept < 1:
        raise InputError("mask: no visible token is left; the encoder needs at least one")
    return _from_order(hidden.int().argsort(dim=1, stable=True), kept)


def _from_order(order: Tensor, kept: int) -> RandomMask:
    restore = order.argsort(1)
    return RandomMask(order[:, :kept], restore, (restore >= kept).float())


def keep_tokens(tokens: Tensor, ids_keep: Tensor) -> Tensor:
    """The tokens ``(batch, n, dim)`` at `ids_keep` ``(batch, visible)``: ``(batch, visible, dim)``."""
    return tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[-1]))


def restore_tokens(visible: Tensor, fill: Tensor, ids_restore: Tensor) -> Tensor:
    """Visible tokens ``(batch, visible, dim)`` at their places among copies of `fill` ``(dim,)``: ``(batch, n, dim)``."""
    missing = ids_restore.shape[1] - visible.shape[1]
    rest = fill.to(visible.dtype).expand(visible.shape[0], missing, -1)
    return keep_tokens(torch.cat([visible, rest], 1), ids_restore)
