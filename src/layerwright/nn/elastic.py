"""Layers of which a leading part can run: weights are shared as slices, and blocks may be left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.nn.slices import slice_linear
from layerwright.nn.subnet import SubnetConfig, ascending

__all__ = ["ElasticFFN", "ElasticLinear", "ElasticStack", "FeedForward", "active_parameters", "running_blocks"]


class ElasticLinear(nn.Linear):
    """A linear layer of which the first `active_in` inputs and `active_out` outputs are used.

    They are views of the whole weight: the entries that are not used get a gradient of exactly zero. An optimizer with
    momentum moves them all the same, by what it remembers.

    Args:
        in_max, out_max: the largest sizes, both active at first.
        bias: whether it has one.
    """

    def __init__(self, in_max: int, out_max: int, bias: bool = True) -> None:
        super().__init__(in_max, out_max, bias)
        self._active = (in_max, out_max)

    @property
    def active_in(self) -> int:
        """Inputs ``(..., active_in)`` that `forward` takes."""
        return self._active[0]

    @active_in.setter
    def active_in(self, size: int) -> None:
        self._active = (_size(size, self.in_features, "active_in"), self._active[1])

    @property
    def active_out(self) -> int:
        """Outputs ``(..., active_out)`` that `forward` makes."""
        return self._active[1]

    @active_out.setter
    def active_out(self, size: int) -> None:
        self._active = (self._active[0], _size(size, self.out_features, "active_out"))

    def active_tensors(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``(active_out, active_in)`` and bias ``(active_out,)``: views."""
        return slice_linear(self, self.active_out, self.active_in)

    def forward(self, input: Tensor) -> Tensor:
        """``x W[:active_out, :active_in]^T + b[:active_out]``."""
        return F.linear(input, *self.active_tensors())

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{super().extra_repr()}, active={self.active_in}->{self.active_out}"


class FeedForward(nn.Module):
    """``W2 dropout(silu(W1 x + b1)) + b2``.

    Args:
        dim: features of a token ``(..., dim)``.
        width: inner neurons.
        dropout: share of them that is set to zero in training, 0 to 1.
    """

    inner: nn.Linear
    outer: nn.Linear

    def __init__(self, dim: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        _share(dropout)
        self.inner, self.outer = nn.Linear(dim, width), nn.Linear(width, dim)
        self.dropout = dropout

    @property
    def dropout_rate(self) -> float:
        """The rate that `forward` uses in training."""
        return self.dropout

    @property
    def active_width(self) -> int:
        """Inner neurons that run."""
        return self.inner.out_features

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as `x`."""
        hidden = F.dropout(F.silu(self.inner(x)), self.dropout_rate, self.training)
        output: Tensor = self.outer(hidden)
        return output

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"dropout={self.dropout_rate:g}"


class ElasticFFN(FeedForward):
    """A feed-forward part whose first `active_width` inner neurons run: ``W1[:c]``, ``b1[:c]``, ``W2[:, :c]``.

    Its dropout follows the width: a narrow network underfits and needs less of it, ``p = dropout c / c_max`` (Shangguan
    et al., 2023, TODM, arXiv 2309.01947).

    Args:
        dim: features of a token ``(..., dim)``.
        widths: those that can be chosen; the largest is active at first.
        dropout: of the largest, 0 to 1.
        adaptive_dropout: False keeps to `dropout` whatever the width.

    Raises:
        InputError: no widths, or a setting out of its range.
    """

    inner: ElasticLinear
    outer: ElasticLinear

    def __init__(self, dim: int, widths: Sequence[int], dropout: float = 0.0, adaptive_dropout: bool = True) -> None:
        widths = ascending(widths)
        nn.Module.__init__(self)
        _share(dropout)
        self.widths = widths
        self.inner, self.outer = ElasticLinear(dim, widths[-1]), ElasticLinear(widths[-1], dim)
        self.dropout, self.adaptive_dropout = dropout, adaptive_dropout

    @property
    def active_width(self) -> int:
        """Inner neurons that run."""
        return self.inner.active_out

    @active_width.setter
    def active_width(self, width: int) -> None:
        if width not in self.widths:
            raise InputError(f"widths: got {width}, expected one of {list(self.widths)}")
        self.inner.active_out = self.outer.active_in = width

    @property
    def dropout_rate(self) -> float:
        """The rate at the present width."""
        return self.dropout * self.active_width / self.widths[-1] if self.adaptive_dropout else self.dropout


class ElasticStack(nn.ModuleList):
    """Blocks of which some are left out; what goes round them is their residual path.

    Each block must keep the shape of its input, add to it, and hold one `ElasticFFN`. The model walks through them with
    `running_blocks`.

    Args:
        blocks: all of them, which run at first.

    Raises:
        TypeError: a block without an `ElasticFFN`, or with several.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self.feed_forwards()
        self.keep = tuple(range(len(self)))

    def feed_forwards(self) -> list[ElasticFFN]:
        """The feed-forward part of each block."""
        found = []
        for index, block in enumerate(self):
            inside = [module for module in block.modules() if isinstance(module, ElasticFFN)]
            if len(inside) != 1:
                raise TypeError(f"blocks: block {index} holds {len(inside)} ElasticFFN, expected one")
            found += inside
        return found

    @property
    def config(self) -> SubnetConfig:
        """The sub-network that runs."""
        parts = self.feed_forwards()
        return SubnetConfig(self.keep, tuple(parts[index].active_width for index in self.keep))

    def activate_(self, config: SubnetConfig) -> None:
        """Let `config` run from now on, in place; blocks that do not run are set to their largest width.

        Raises:
            InputError: a block that is not there, or a width that its feed-forward part does not have; names the axis.
        """
        parts = self.feed_forwards()
        if config.keep[-1] >= len(parts):
            raise InputError(f"keep: got block {config.keep[-1]}, expected 0 to {len(parts) - 1}")
        chosen = dict(zip(config.keep, config.widths, strict=True))
        for index, width in chosen.items():
            if width not in parts[index].widths:
                raise InputError(f"widths: got {width} for block {index}, expected one of {list(parts[index].widths)}")
        for index, part in enumerate(parts):
            part.active_width = chosen.get(index, part.widths[-1])
        self.keep = config.keep

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"keep={self.keep}"


def running_blocks(blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """The blocks that run, in order: all of a plain list."""
    if isinstance(blocks, ElasticStack):
        return (blocks[index] for index in blocks.keep)
    return iter(blocks)


def active_parameters(model: nn.Module) -> int:
    """Number of parameters of the sub-network that runs: without other blocks, slices counted as what they are."""
    left_out = {
        id(block)
        for stack in model.modules()
        if isinstance(stack, ElasticStack)
        for index, block in enumerate(stack)
        if index not in stack.keep
    }
    seen: set[int] = set()

    def count(module: nn.Module) -> int:
        if id(module) in left_out or id(module) in seen:
            return 0
        seen.add(id(module))
        if isinstance(module, ElasticLinear):
            return sum(tensor.numel() for tensor in module.active_tensors() if tensor is not None)
        own = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen.update(id(p) for p in own)
        return sum(p.numel() for p in own) + sum(count(child) for child in module.children())

    return count(model)


def _size(size: int, most: int, name: str) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most:
        raise InputError(f"{name}: got {size!r}, expected 1 to {most}")
    return size


def _share(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise InputError(f"dropout: got {dropout}, expected from 0 to below 1")
