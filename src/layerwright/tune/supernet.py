"""Train all sub-networks of an elastic network at once: the sandwich rule, with distillation in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layerwright.core.errors import InputError
from layerwright.nn.elastic import ElasticStack, active_parameters
from layerwright.nn.subnet import SubnetConfig, SubnetSpace

__all__ = ["SandwichStep", "Supernet", "sandwich_step"]

Loss = Callable[[Any, Any], Tensor]
"""``loss(outputs, batch) -> scalar``."""
Divergence = Callable[[Any, Any, Any], Tensor]
"""``kd(student's outputs, teacher's outputs, batch) -> scalar``."""


class Supernet:
    """A network with an `ElasticStack`, and the sub-networks of it that are trained and used.

    Args:
        model: with one stack of elastic blocks.
        space: its sub-networks; None takes all widths and every depth.

    Raises:
        TypeError: no stack, several, or a BatchNorm: its statistics are those of one sub-network.
        InputError: a space that is not of this stack.
    """

    def __init__(self, model: nn.Module, space: SubnetSpace | None = None) -> None:
        stacks = [module for module in model.modules() if isinstance(module, ElasticStack)]
        if len(stacks) != 1:
            raise TypeError(f"model: {type(model).__name__} holds {len(stacks)} ElasticStack, expected one")
        for path, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise TypeError(
                    f"model: {path} is a {type(module).__name__}, whose statistics differ from one sub-network to the next; "
                    "use LayerNorm or RMSNorm"
                )
        self.model, self.stack = model, stacks[0]
        parts = self.stack.feed_forwards()
        common = sorted(set.intersection(*(set(part.widths) for part in parts)))
        if space is None:
            space = SubnetSpace(len(parts), tuple(range(1, len(parts) + 1)), tuple(common))
        if space.blocks != len(parts):
            raise InputError(f"space: got {space.blocks} blocks, expected the {len(parts)} of the model")
        missing = [width for width in space.widths if width not in common]
        if missing:
            raise InputError(f"widths: got {missing}, expected some of the model's {common}")
        self.space = space

    def max(self) -> SubnetConfig:
        """The largest sub-network."""
        return self.space.max()

    def min(self) -> SubnetConfig:
        """The smallest one."""
        return self.space.min()

    def sample(self, generator: torch.Generator) -> SubnetConfig:
        """A random one."""
        return self.space.sample(generator)

    @contextmanager
    def active(self, config: SubnetConfig) -> Iterator[nn.Module]:
        """Let `config` run inside this context; the model then runs again what it ran before.

        Raises:
            InputError: not of the space; names the axis.
        """
        self.space.check(config)
        before = self.stack.keep, [part.active_width for part in self.stack.feed_forwards()]
        self.stack.activate_(config)
        try:
            yield self.model
        finally:
            self.stack.keep = before[0]
            for part, width in zip(self.stack.feed_forwards(), before[1], strict=True):
                part.active_width = width

    def parameter_count(self, config: SubnetConfig) -> int:
        """Parameters of the whole network when `config` runs."""
        with self.active(config) as model:
            return active_parameters(model)

    def relative_cost(self, config: SubnetConfig) -> float:
        """Parameters of the blocks of `config` as a share of the largest network's.

        Each weight of a block is used once for every frame, so that this is also their share of multiplications.
        """

        def blocks(which: SubnetConfig) -> int:
            with self.active(which):
                return active_parameters(self.stack)

        return blocks(config) / blocks(self.max())


@dataclass(frozen=True)
class SandwichStep:
    """What one step came to.

    Attributes:
        configs: the sub-networks: the largest, the smallest, and the random ones.
        losses: of each.
        passes: forward passes, in units of the largest network's.
    """

    configs: tuple[SubnetConfig, ...]
    losses: tuple[float, ...]
    passes: float


def sandwich_step(
    supernet: Supernet,
    batch: Any,
    loss: Loss,
    kd: Divergence | None = None,
    *,
    n_random: int = 1,
    label_weight: float = 1.0,
    optimizer: torch.optim.Optimizer | None = None,
    clip: float | None = 1.0,
    generator: torch.Generator | None = None,
) -> SandwichStep:
    """One step of the sandwich rule: gradients of the largest, the smallest and random sub-networks, added up (Yu and
    Huang, 2019, arXiv 1903.05134; with distillation in place, Shangguan et al., 2023, TODM, arXiv 2309.01947).

    The largest network learns from the labels. What it said in the same step teaches the others, and gets no gradient of
    that. Memory: one sub-network's graph at a time, and the outputs of the largest.

    Args:
        supernet: its model is run with the batch: a mapping as keywords, anything else as it is.
        batch: of data.
        loss: of outputs and batch.
        kd: of the other networks' outputs, the largest one's, and the batch; None trains all on labels. A sum over a
            lattice may outweigh the labels by far: scale it.
        n_random: random sub-networks, 0 or more.
        label_weight: how much of `loss` the others get beside `kd`; 0 leaves the labels to the largest.
        optimizer: any; makes a step with these gradients alone. None leaves the gradients where they are, added to what
            was there.
        clip: bound on the norm of all gradients before the step; None does without.
        generator: of the random sub-networks.

    Raises:
        InputError: a number out of its range, no generator, or a loss that is not finite.
    """
    if n_random < 0 or label_weight < 0 or (clip is not None and not clip > 0):
        raise InputError(
            f"sandwich_step: got n_random={n_random}, label_weight={label_weight}, clip={clip}; expected 0 or more, "
            "and a clip above 0"
        )
    if n_random and generator is None:
        raise InputError("generator: got None, expected one to draw random sub-networks from")
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
    configs = [supernet.max(), supernet.min()]
    configs += [supernet.sample(generator) for _ in range(n_random)] if generator is not None else []
    teacher: Any = None
    losses: list[float] = []
    for config in configs:
        with supernet.active(config) as model:
            outputs = model(**batch) if isinstance(batch, Mapping) else model(batch)
            if not losses or kd is None:
                value = loss(outputs, batch)
            else:
                value = kd(outputs, teacher, batch)
                if label_weight:
                    value = value + label_weight * loss(outputs, batch)
            if not bool(torch.isfinite(value)):
                raise InputError(f"loss: {float(value.detach())} for {config}: lower the learning rate")
            torch.autograd.backward(value)
        teacher = _detached(outputs) if not losses else teacher
        losses.append(float(value.detach()))
    if optimizer is not None:
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
    passes = sum(supernet.relative_cost(config) for config in configs)
    return SandwichStep(tuple(configs), tuple(losses), passes)


def _detached(outputs: Any) -> Any:
    """The same structure, its tensors without a graph."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)
