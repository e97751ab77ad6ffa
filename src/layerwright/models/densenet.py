"""DenseNet-BC with a growth rate for every layer, and growth that keeps its function."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models.plain_cnn import _start_
from layerwright.treat.grow.growth_map import GrowthMap, with_noise
from layerwright.treat.grow.reach import find_reach
from layerwright.treat.grow.wider import grow_readers_, widen_

__all__ = ["DenseLayer", "DenseNetBC", "Transition", "deepen_dense_", "widen_dense_", "widen_transitions_"]


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1 x 1 convolution to a bottleneck, BatchNorm, ReLU, 3 x 3 convolution; then both side by side."""

    def __init__(self, inputs: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.utils.skip_init(nn.Conv2d, inputs, bottleneck, 1, bias=False, device="cpu")
        self.norm2 = nn.BatchNorm2d(bottleneck)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.utils.skip_init(nn.Conv2d, bottleneck, growth, 3, padding=1, bias=False, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, inputs, height, width)`` to ``(batch, inputs + growth, height, width)``."""
        new = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1 x 1 convolution, mean over 2 x 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 1, bias=False, device="cpu")
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, inputs, height, width)`` to ``(batch, outputs, height / 2, width / 2)``."""
        output: Tensor = self.pool(self.conv(self.relu(self.norm(x))))
        return output


class DenseNetBC(nn.Module):
    """Dense blocks with bottlenecks and compressing transitions (Huang et al., 2017), a growth rate for every layer.

    In words: ``g4`` is a layer of growth 4, ``t`` a transition.

    Args:
        growths: growth rates, one list a block.
        reduction: outputs of a transition over its inputs.
        bc_ratio: width of a bottleneck over the growth.
        first_ratio: filters of the first convolution over the mean growth.
        classes: outputs of the classifier.
        channels: of the images.
        stem, transitions, bottlenecks: widths of the first convolution, the transitions and the bottlenecks where they
            are not those of the ratios, as after growth.
        generator: of the first weights (He, 2015); seed 0 if left out.

    Raises:
        InputError: no block, an empty one, or a growth below 1; widths that do not fit the blocks.
    """

    def __init__(
        self,
        growths: Sequence[Sequence[int]],
        reduction: float = 0.5,
        bc_ratio: int = 4,
        first_ratio: float = 2.0,
        classes: int = 10,
        channels: int = 1,
        stem: int | None = None,
        transitions: Sequence[int] | None = None,
        bottlenecks: Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not growths or any(not block or min(block) < 1 for block in growths):
            raise InputError(f"growths: got {list(growths)}, expected a list of growth rates above 0 for every block")
        inner = [[bc_ratio * g for g in block] for block in growths] if bottlenecks is None else bottlenecks
        fits = transitions is None or len(transitions) == len(growths) - 1
        if not fits or [len(block) for block in inner] != [len(block) for block in growths]:
            raise InputError("transitions, bottlenecks: expected a width between blocks, and one for every layer")
        self.reduction, self.bc_ratio, self.first_ratio = reduction, bc_ratio, first_ratio
        self.classes, self.channels = classes, channels
        width = max(1, int(first_ratio * _mean(growths))) if stem is None else stem
        self.stem = nn.utils.skip_init(nn.Conv2d, channels, width, 3, padding=1, bias=False, device="cpu")
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for number, block in enumerate(growths):
            layers = nn.Sequential()
            for growth, bottleneck in zip(block, inner[number], strict=True):
                layers.append(DenseLayer(width, growth, bottleneck))
                width += growth
            self.blocks.append(layers)
            if number + 1 < len(growths):
                outputs = max(1, int(reduction * width)) if transitions is None else transitions[number]
                self.transitions.append(Transition(width, outputs))
                width = outputs
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.utils.skip_init(nn.Linear, width, classes, device="cpu")
        _start_(self, generator)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of images ``(batch, channels, height, width)``."""
        x = self.stem(pixel_values)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number < len(self.transitions):
                x = self.transitions[number](x)
        output: Tensor = self.classifier(self.pool(self.relu(self.norm(x))).flatten(1))
        return output

    @property
    def growths(self) -> list[list[int]]:
        """Growth rates as they are now, one list a block."""
        blocks: Any = self.blocks
        return [[layer.conv2.out_channels for layer in block] for block in blocks]

    def to_spec(self) -> list[str]:
        """The words, read from the layers as they are now."""
        words: list[str] = []
        for number, block in enumerate(self.growths):
            words += [*(["t"] if number else []), *(f"g{growth}" for growth in block)]
        return words

    @classmethod
    def from_spec(cls, spec: Sequence[str], **settings: Any) -> Self:
        """The network of these words; `settings` as for the class.

        Raises:
            InputError: a word that is neither ``g<growth>`` nor ``t``.
        """
        growths: list[list[int]] = [[]]
        for word in spec:
            if word == "t":
                growths.append([])
            elif word[:1] == "g" and word[1:].isdecimal():
                growths[-1].append(int(word[1:]))
            else:
                raise InputError(f"spec: got {word!r}, expected g<growth> or t")
        return cls(growths, **settings)

    def settings(self) -> dict[str, Any]:
        """What else it takes to build the same form."""
        blocks: Any = self.blocks
        return {
            "reduction": self.reduction,
            "bc_ratio": self.bc_ratio,
            "first_ratio": self.first_ratio,
            "classes": self.classes,
            "channels": self.channels,
            "stem": self.stem.out_channels,
            "transitions": [transition.conv.out_channels for transition in self.transitions],  # type: ignore[union-attr]
            "bottlenecks": [[layer.conv1.out_channels for layer in block] for block in blocks],
        }

    @staticmethod
    def count_parameters(
        growths: Sequence[Sequence[int]],
        reduction: float = 0.5,
        bc_ratio: int = 4,
        first_ratio: float = 2.0,
        classes: int = 10,
        channels: int = 1,
    ) -> int:
        """Number of parameters of a network with the widths of the ratios, by formula."""
        width = max(1, int(first_ratio * _mean(growths)))
        total = 9 * channels * width
        for number, block in enumerate(growths):
            for growth in block:
                inner = bc_ratio * growth
                total += 2 * width + width * inner + 2 * inner + 9 * inner * growth
                width += growth
            if number + 1 < len(growths):
                outputs = max(1, int(reduction * width))
                total += 2 * width + width * outputs
                width = outputs
        return total + 2 * width + (width + 1) * classes


def widen_dense_(
    model: DenseNetBC,
    block: int,
    layer: int,
    growth: int,
    generator: torch.Generator | None = None,
    noise: float = 0.0,
) -> None:
    """Raise a layer's growth, in place: its bottleneck first, to `bc_ratio` times the growth, then its outputs.

    Raises:
        InputError: there is no such layer, or `growth` is not larger.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    own = _layer(model, block, layer)
    if growth <= own.conv2.out_channels:
        raise InputError(f"new_width: got {growth}, expected more than the present growth {own.conv2.out_channels}")
    path = f"blocks.{block}.{layer}"
    if model.bc_ratio * growth > own.conv1.out_channels:
        widen_(model, f"{path}.conv1", model.bc_ratio * growth, generator=generator, noise=noise)
    widen_(model, f"{path}.conv2", growth, generator=generator, noise=noise)


@torch.no_grad()
def deepen_dense_(
    model: DenseNetBC, block: int, layer: int, generator: torch.Generator | None = None, noise: float = 0.0
) -> None:
    """Insert a copy of a dense layer behind it, in place, so that the function stays.

    The copy does not read the layer's own outputs at first (zero weights), and gives its outputs in a random order,
    with repetition; who reads the layer reads both as duplicates, with weights divided by how often each occurs.

    Args:
        model: changed.
        block, layer: which one, from 0.
        generator: of the order and the noise; seed 0 if left out.
        noise: standard deviation of the noise on the copy's weights, as a share of their own.

    Raises:
        InputError: there is no such layer.

    Source: Cai et al., Efficient Architecture Search by Network Transformation, 2017.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    old = _layer(model, block, layer)
    growth = old.conv2.out_channels
    drawn = torch.randint(growth, (growth,), generator=generator)
    reach = find_reach(model, f"blocks.{block}.{layer}.conv2")
    grow_readers_(model, reach, GrowthMap.of(torch.cat([torch.arange(growth), drawn])))
    new = copy.deepcopy(old)
    weight = torch.cat([old.conv1.weight, old.conv1.weight.new_zeros(old.conv1.out_channels, growth, 1, 1)], 1)
    outputs = old.conv2.weight.index_select(0, drawn.to(weight.device))
    if noise:
        weight = with_noise(weight, noise * weight.float().std(correction=0), generator)
        outputs = with_noise(outputs, noise * outputs.float().std(correction=0), generator)
    new.conv1.weight = nn.Parameter(weight.contiguous(), old.conv1.weight.requires_grad)
    new.conv1.in_channels = weight.shape[1]
    new.conv2.weight = nn.Parameter(outputs.contiguous(), old.conv2.weight.requires_grad)
    _pad_norm_(new.norm1, growth)
    model.blocks[block].insert(layer + 1, new)  # type: ignore[operator]


def widen_transitions_(model: DenseNetBC, generator: torch.Generator | None = None, noise: float = 0.0) -> None:
    """Widen the first convolution and the transitions to what the ratios ask of the present growths, in place.

    None gets narrower. Done once the layers have grown.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    wanted = int(model.first_ratio * _mean(model.growths))
    if wanted > model.stem.out_channels:
        widen_(model, "stem", wanted, generator=generator, noise=noise)
    for number, transition in enumerate(model.transitions):
        conv: Any = transition.conv
        wanted = int(model.reduction * conv.in_channels)
        if wanted > conv.out_channels:
            widen_(model, f"transitions.{number}.conv", wanted, generator=generator, noise=noise)


def _layer(model: DenseNetBC, block: int, layer: int) -> DenseLayer:
    blocks: Any = model.blocks
    if not 0 <= block < len(blocks) or not 0 <= layer < len(blocks[block]):
        raise InputError(f"layer: got block {block}, layer {layer}; the network has {[len(b) for b in blocks]} layers")
    found: DenseLayer = blocks[block][layer]
    return found


def _pad_norm_(norm: nn.BatchNorm2d, channels: int) -> None:
    """`channels` more, at the end, each an identity up to eps: shift and mean 0, scale and variance 1."""
    for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        old = getattr(norm, name)
        new = torch.cat([old.detach(), old.new_full((channels,), value)])
        setattr(norm, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    norm.num_features += channels


def _mean(growths: Sequence[Sequence[int]]) -> float:
    flat = [growth for block in growths for growth in block]
    return sum(flat) / len(flat)
