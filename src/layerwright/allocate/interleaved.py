"""Depth by a fixed pattern: both ends stay, and every second block between them (Zhu et al., 2023)."""

from __future__ import annotations

from layerwright.core.errors import InputError

__all__ = ["interleaved_keep"]


def interleaved_keep(num_layers: int, keep_first: int = 3, keep_last: int = 1, stride: int = 2) -> list[int]:
    """Indices of the blocks that stay: the first and the last ones, and every `stride`-th counted from the start.

    With the defaults 8 of 12 stay and 14 of 24, the published lists for BART-large and T5-large (Zhu et al., 2023,
    arXiv 2305.08285).

    Raises:
        InputError: a number below its least value: 1 for `num_layers` and `stride`, 0 for the others.
    """
    for name, value, least in (
        ("num_layers", num_layers, 1),
        ("keep_first", keep_first, 0),
        ("keep_last", keep_last, 0),
        ("stride", stride, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name}: got {value!r}, expected a whole number of at least {least}")
    last = num_layers - keep_last
    return [index for index in range(num_layers) if index < keep_first or index >= last or index % stride == 0]
