"""Networks as lists of words: which can grow, and into what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from layerwright.core.errors import InputError, unknown_name

__all__ = ["DenseSpace", "PlainSpace", "Space", "encode"]

Spec = Sequence[str]


class Space(Protocol):
    """What a controller must know of the networks that it grows."""

    @property
    def words(self) -> tuple[str, ...]:
        """All words, in the order of their embeddings."""

    @property
    def decisions(self) -> tuple[int, ...]:
        """Choices of each step of an insertion: blocks, layers in a block, and kernel sizes if there are any."""

    def growable(self, spec: Spec) -> list[bool]:
        """Whether each word can be widened."""

    def blocks(self, spec: Spec) -> list[list[int]]:
        """Positions of the layers of each block."""

    def wider(self, word: str) -> str:
        """The word of the next size."""

    def inserted(self, spec: Spec, position: int, kernel: int | None) -> list[str]:
        """`spec` with a layer behind that at `position`."""

    def takes_kernel(self, word: str) -> bool:
        """Whether a layer behind `word` has a kernel size to choose."""


def encode(words: Sequence[str], spec: Spec, steps: int) -> list[int]:
    """Numbers of the words of `spec`, from 1, padded with 0 to `steps`.

    Raises:
        InputError: an unknown word, none at all, or more than `steps`.
    """
    number = {word: i + 1 for i, word in enumerate(words)}
    unknown = next((word for word in spec if word not in number), None)
    if unknown is not None:
        error = unknown_name("word", unknown, number, "spec")
        raise InputError(f"spec: {error}")
    if not 0 < len(spec) <= steps:
        raise InputError(f"spec: got {len(spec)} words, expected 1 to {steps} (steps)")
    return [number[word] for word in spec] + [0] * (steps - len(spec))


@dataclass(frozen=True)
class PlainSpace:
    """Plain convolutional networks: ``conv-<filters>-<kernel>``, ``fc-<units>``, ``pool``.

    Attributes:
        filters, units: sizes that follow each other, ascending.
        kernels: of inserted convolutions, odd.
        max_blocks, max_layers: blocks (between pools) and layers of one in which the controller can insert.

    Raises:
        InputError: sizes that do not ascend, or an even kernel.
    """

    filters: tuple[int, ...] = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512)
    units: tuple[int, ...] = (64, 128, 256, 384, 512, 640, 768, 896, 1024)
    kernels: tuple[int, ...] = (1, 3, 5)
    max_blocks: int = 5
    max_layers: int = 10

    def __post_init__(self) -> None:
        for name, sizes in (("filters", self.filters), ("units", self.units), ("kernels", self.kernels)):
            _ascending(name, sizes)
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise InputError(f"kernels: got {self.kernels}, expected odd sizes")

    @property
    def words(self) -> tuple[str, ...]:
        """All words, in the order of their embeddings."""
        convs = (f"conv-{f}-{k}" for f in self.filters for k in self.kernels)
        return (*convs, *(f"fc-{u}" for u in self.units), "pool")

    @property
    def decisions(self) -> tuple[int, ...]:
        """Blocks, layers in a block, kernel sizes."""
        return (self.max_blocks, self.max_layers, len(self.kernels))

    def growable(self, spec: Spec) -> list[bool]:
        """Whether each word can be widened: layers below the largest size."""
        return [word != "pool" and _size(word) < self._sizes(word)[-1] for word in spec]

    def blocks(self, spec: Spec) -> list[list[int]]:
        """Positions of the layers between pools."""
        return _blocks(spec, "pool")

    def wider(self, word: str) -> str:
        """The word of the next size."""
        kind, _, rest = word.partition("-")
        size = next(size for size in self._sizes(word) if size > _size(word))
        return "-".join([kind, str(size), *rest.split("-")[1:]])

    def inserted(self, spec: Spec, position: int, kernel: int | None) -> list[str]:
        """`spec` with a layer of the same width behind that at `position`."""
        word = spec[position]
        if self.takes_kernel(word):
            if kernel is None:
                raise InputError(f"kernel: got none for a layer behind {word}")
            word = f"conv-{_size(word)}-{kernel}"
        return [*spec[: position + 1], word, *spec[position + 1 :]]

    def takes_kernel(self, word: str) -> bool:
        """Whether it is a convolution."""
        return word.startswith("conv-")

    def _sizes(self, word: str) -> tuple[int, ...]:
        return self.filters if self.takes_kernel(word) else self.units


@dataclass(frozen=True)
class DenseSpace:
    """DenseNets: ``g<growth>`` a layer, ``t`` a transition.

    Attributes:
        growths: growth rates that follow each other, ascending.
        max_blocks, max_layers: blocks and layers of one in which the controller can insert.
    """

    growths: tuple[int, ...] = tuple(range(4, 50, 2))
    max_blocks: int = 3
    max_layers: int = 20

    def __post_init__(self) -> None:
        _ascending("growths", self.growths)

    @property
    def words(self) -> tuple[str, ...]:
        """All words, in the order of their embeddings."""
        return (*(f"g{growth}" for growth in self.growths), "t")

    @property
    def decisions(self) -> tuple[int, ...]:
        """Blocks, layers in a block."""
        return (self.max_blocks, self.max_layers)

    def growable(self, spec: Spec) -> list[bool]:
        """Whether each word can be widened: layers below the largest growth."""
        return [word != "t" and int(word[1:]) < self.growths[-1] for word in spec]

    def blocks(self, spec: Spec) -> list[list[int]]:
        """Positions of the layers between transitions."""
        return _blocks(spec, "t")

    def wider(self, word: str) -> str:
        """The word of the next growth."""
        return f"g{next(growth for growth in self.growths if growth > int(word[1:]))}"

    def inserted(self, spec: Spec, position: int, kernel: int | None) -> list[str]:
        """`spec` with a copy of the layer at `position` behind it; there is no kernel size to choose."""
        return [*spec[: position + 1], spec[position], *spec[position + 1 :]]

    def takes_kernel(self, word: str) -> bool:
        """No layer has one."""
        return False


def _ascending(name: str, sizes: Sequence[int]) -> None:
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise InputError(f"{name}: got {tuple(sizes)}, expected ascending sizes above 0")


def _size(word: str) -> int:
    return int(word.split("-")[1])


def _blocks(spec: Spec, border: str) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for position, word in enumerate(spec):
        if word == border:
            found.append([])
        else:
            found[-1].append(position)
    return found
