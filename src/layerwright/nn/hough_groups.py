"""Which weights of a 4-D or 6-D matching kernel are one and the same: kernels that only look at distances."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name

__all__ = ["HoughKind", "SharedKernel", "chm_groups", "group_numbers"]

HoughKind = Literal["psi", "iso", "full"]
KINDS: tuple[HoughKind, ...] = ("psi", "iso", "full")
_SMALL = 1e-3
"""Standard deviation of the first values in a shared kernel, before their absolute value is taken."""


def group_numbers(
    kernel_size: int, kind: HoughKind = "psi", center_pivot: bool = False, dims: int = 2
) -> tuple[int, ...]:
    """The group of every entry of a kernel, in row-major order; -1 where the entry is left out.

    An entry joins an offset p in the first image and an offset q in the second. Groups are numbered as they are met.

    Args:
        kernel_size: odd side of the kernel.
        kind: ``psi`` shares where the larger and the smaller of ``|p|`` and ``|q|`` and also ``|p - q|`` agree; ``iso``
            where ``|p - q|`` agrees; ``full`` nowhere.
        center_pivot: keep the entries with ``p = 0`` or ``q = 0`` alone.
        dims: of an offset: 2 in the plane, 1 along scales.

    Raises:
        InputError: an even kernel size, or an unknown kind.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"kernel_size: got {kernel_size}, expected an odd number, so that there is a centre")
    if kind not in KINDS:
        raise unknown_name("kind", str(kind), KINDS)
    reach = kernel_size // 2
    offsets = list(itertools.product(range(-reach, reach + 1), repeat=dims))
    seen: dict[tuple[object, ...], int] = {}
    return tuple(
        -1 if center_pivot and any(p) and any(q) else seen.setdefault(_key(kind, p, q), len(seen))
        for p, q in itertools.product(offsets, repeat=2)
    )


def _key(kind: HoughKind, p: tuple[int, ...], q: tuple[int, ...]) -> tuple[object, ...]:
    """What two entries must have in common to share a weight."""
    if kind == "full":
        return (p, q)
    apart = sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
    if kind == "iso":
        return (apart,)
    lengths = [sum(a * a for a in offset) for offset in (p, q)]
    return (max(lengths), min(lengths), apart)


def chm_groups(kernel_size: int, kind: HoughKind = "psi", center_pivot: bool = False, dims: int = 2) -> list[Tensor]:
    """Flat places of the entries of each group of a kernel with ``kernel_size ** (2 dims)`` entries.

    ``psi`` has 11, 55 and 179 groups for sides of 3, 5 and 7 in the plane, ``iso`` 6, 15 and 27; with `center_pivot`
    both have 3 and 6 for 3 and 5. Along scales (`dims` = 1, side 3) ``psi`` has 4 and ``iso`` has 3.

    Source: Min and Cho, "Convolutional Hough Matching Networks" (2021, arXiv 2103.16831). Arguments and errors as for
    `group_numbers`.
    """
    numbers = torch.tensor(group_numbers(kernel_size, kind, center_pivot, dims))
    return [(numbers == number).nonzero()[:, 0] for number in range(int(numbers.max()) + 1)]


class SharedKernel(nn.Module):
    """A kernel of any shape made from one weight for each group of its entries: ``kernel = weight / size of the group``.

    The division makes a step of an optimizer move the sum over a group, not each of its entries, by the learning rate.

    Args:
        numbers: group of every entry in row-major order, -1 for an entry that stays zero.
        shape: of the kernel.
    """

    group: Tensor
    sizes: Tensor

    def __init__(self, numbers: Sequence[int], shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        count = max(numbers) + 1
        sizes = [0] * count
        for number in numbers:
            if number >= 0:
                sizes[number] += 1
        self.weight = nn.Parameter(torch.empty(count))
        # Place -1 is the zero at the end. The sizes stay whole numbers in any precision.
        self.register_buffer("group", torch.tensor(numbers), persistent=False)
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)

    @torch.no_grad()
    def start_(self, ascending: bool = False, generator: torch.Generator | None = None) -> None:
        """First values: entries ``|normal(0, 1e-3)|``; `ascending` gives the smallest to the groups met first."""
        if self.weight.is_meta:
            return
        entries = torch.randn(self.weight.shape, generator=generator).abs() * _SMALL
        if ascending:
            entries = entries.sort().values
        self.weight.copy_(entries * self.sizes)

    def forward(self) -> Tensor:
        """The kernel."""
        entries = torch.cat([self.weight / self.sizes, self.weight.new_zeros(1)])
        return entries[self.group].view(self.shape)
