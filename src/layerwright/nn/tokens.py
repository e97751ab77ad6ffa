"""Work on some tokens only: gather them, compute, put the results back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["run_on_tokens"]


def run_on_tokens(fn: Callable[[Tensor], Tensor], x: Tensor, mask: Tensor) -> Tensor:
    """`fn` of the tokens of `x` where `mask` is true, zero elsewhere; the others are not computed.

    Args:
        fn: ``(tokens, features) -> (tokens, out features)``, each token by itself. Not called if no token is wanted
            and the result's width is that of `x`.
        x: ``(..., features)``.
        mask: boolean, ``(...)``.

    Returns:
        ``(..., out features)`` in the dtype that `fn` gives. Memory: the chosen tokens and the result.

    Raises:
        InputError: the shape of `mask` is not that of the tokens.
    """
    if mask.shape != x.shape[:-1]:
        raise InputError(
            f"mask: got shape {tuple(mask.shape)}, expected {tuple(x.shape[:-1])}, one value for each token"
        )
    rows = x.reshape(-1, x.shape[-1])
    chosen = mask.reshape(-1).nonzero().squeeze(1)
    if chosen.numel() == rows.shape[0]:
        return fn(rows).reshape(*x.shape[:-1], -1)
    if not chosen.numel():
        return x * 0
    done = fn(rows.index_select(0, chosen))
    result = done.new_zeros(rows.shape[0], done.shape[-1]).index_copy(0, chosen, done)
    return result.reshape(*x.shape[:-1], -1)
