"""What kind of layer a module is by itself, and how it stores its weight."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from layerwright.core._experts import experts_layout
from layerwright.core.layer import Kind, Layout

__all__: list[str] = []

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EPSILONS = ("eps", "epsilon", "variance_epsilon")


@dataclass(frozen=True)
class Leaf:
    """A layer before its place in the model is known.

    Attributes:
        path: module, or the full name of a parameter that no known layer holds.
        kind: what it is by itself.
        tensor: full name of its main parameter, ``""`` if it has none.
        shape: as matrix ``(out, in)``, ``(0, 0)`` if it is none.
        count: number of matrices.
        layout: how they are stored.
        plain: the main parameter is a matrix called weight, of a module of unknown class.
    """

    path: str
    kind: Kind
    tensor: str = ""
    shape: tuple[int, int] = (0, 0)
    count: int = 1
    layout: Layout = "none"
    plain: bool = False


def leaves(path: str, module: nn.Module, parent: nn.Module | None) -> Iterator[Leaf]:
    """The layers that `module` makes with the parameters it holds itself: none, one, or one for each parameter."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    prefix = f"{path}." if path else ""
    known = _known(path, module, parent, own.get("weight"), prefix)
    if known is not None:
        yield known
        return
    if own and _is_norm(module, own):
        yield Leaf(path, "norm", prefix + next(iter(own)))
        return
    if "weight" in own and own.keys() <= {"weight", "bias"} and not list(module.children()) and own["weight"].dim() < 3:
        yield Leaf(path, "other", f"{prefix}weight", _sides(own["weight"]), plain=own["weight"].dim() == 2)
        return
    yield from _loose(prefix, module, own)


def _known(path: str, module: nn.Module, parent: nn.Module | None, weight: Tensor | None, prefix: str) -> Leaf | None:
    name = f"{prefix}weight" if weight is not None else ""
    if isinstance(module, nn.Linear):
        sides = (module.out_features, module.in_features)
        usable = weight is not None and tuple(weight.shape) == sides and weight.is_floating_point()
        # Multi-head attention reads the weight of its output layer without calling the layer.
        called = not isinstance(parent, nn.MultiheadAttention)
        return Leaf(path, "linear", name, sides, layout="linear" if usable and called else "none")
    if isinstance(module, _ConvNd):
        kernel = math.prod(module.kernel_size)
        sides = (module.out_channels, module.in_channels // module.groups * kernel)
        straight = not isinstance(module, _ConvTransposeNd) and weight is not None
        return Leaf(path, "conv", name, sides, layout="conv" if straight else "none")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        usable = weight is not None and weight.dim() == 2
        return Leaf(path, "embedding", name, _sides(weight), layout="linear" if usable else "none")
    if weight is not None and _is_conv1d(module):
        return Leaf(path, "linear", name, (weight.shape[1], weight.shape[0]), layout="conv1d")
    return _packed(path, module) if weight is None else None


def _packed(path: str, module: nn.Module) -> Leaf | None:
    """A layer that keeps its weight in buffers, in a packed form, and states the size of the dense one."""
    saved = module._buffers.keys() - module._non_persistent_buffers_set
    if not saved or any(p is not None and p.dim() > 1 for p in module._parameters.values()):
        return None
    forms: tuple[tuple[Kind, str, str], ...] = (
        ("linear", "out_features", "in_features"),
        ("embedding", "num_embeddings", "embedding_dim"),
        ("experts" if getattr(module, "stacked", False) else "conv", "rows", "columns"),
    )
    for kind, out, in_ in forms:
        sides = (getattr(module, out, None), getattr(module, in_, None))
        if isinstance(sides[0], int) and isinstance(sides[1], int):
            return Leaf(path, kind, "", (sides[0], sides[1]), getattr(module, "count", 1))
    return None


def _is_conv1d(module: nn.Module) -> bool:
    """The linear layer of GPT-2 in transformers, whose weight is stored (in, out)."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def _is_norm(module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    if isinstance(module, _NORMS):
        return True
    named = "norm" in type(module).__name__.lower() or any(hasattr(module, name) for name in _EPSILONS)
    return named and not list(module.children()) and all(p.dim() <= 1 for p in own.values())


def _loose(prefix: str, module: nn.Module, own: dict[str, nn.Parameter]) -> Iterator[Leaf]:
    """One entry for each parameter; the bias of experts belongs to its weight."""
    layouts = experts_layout(module)
    for name, p in own.items():
        if name in layouts:
            out, in_ = p.shape[1:] if layouts[name] == "experts" else p.shape[:0:-1]
            yield Leaf(prefix + name, "experts", prefix + name, (out, in_), p.shape[0], layouts[name])
        elif name.removesuffix("_bias") not in layouts or not name.endswith("_bias"):
            yield Leaf(prefix + name, "other", prefix + name, _sides(p), plain=name == "weight" and p.dim() == 2)


def _sides(tensor: Tensor | None) -> tuple[int, int]:
    return (tensor.shape[0], tensor.shape[1]) if tensor is not None and tensor.dim() == 2 else (0, 0)
