"""Where a model can be made adaptive: its feed-forward parts and attention projections, as inputs and outputs (ACM)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers
from layerwright.nn.lora import linear_sides

__all__ = ["Site", "find_sites", "site_activation"]

_PROJECTIONS = ("q", "k", "v", "qkv", "o")
_ACTIVATIONS = {
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
"""Names of `nn.adaptive.ACTIVATIONS` by the class that computes the same."""
_DOES_NOTHING = ("Dropout", "Identity", "StochasticDepth", "DropPath")


@dataclass(frozen=True)
class Site:
    """A part of a model that an adaptive module can take the place of.

    Attributes:
        path: of the module whose output is the part's output; the adaptive module goes there.
        layers: paths of its linear layers in order: the last one gives the output.
        weights: number of weights in their matrices.
        dim, out_dim: features that go in and come out.
        kind: ``mlp`` or ``projection``.
        residual: whether the output is added to what goes around it, so that it may be zero.
        passed: paths of modules before it that then pass on what they are given; the first one reads the part's input.
        activation: path of the module between the two layers, ``""`` where it is not known.
    """

    path: str
    layers: tuple[str, ...]
    weights: int
    dim: int
    out_dim: int
    kind: str
    residual: bool
    passed: tuple[str, ...] = ()
    activation: str = ""


def find_sites(model: nn.Module, targets: str | Sequence[str]) -> tuple[Site, ...]:
    """The sites that `targets` names, in the model's order.

    Args:
        model: any model; names and shapes are read only.
        targets: ``mlp``, ``mlp+attention``, ``attention``, or names of modules: paths or their last parts.

    Raises:
        TypeError: a module that is neither a feed-forward part nor a linear layer with as many features out as in (or
            an attention projection).
        InputError: no such module, or a model without such parts.
    """
    refs = list_layers(model)
    known = _all_sites(model, refs)
    wanted = {"mlp": ("mlp",), "attention": ("projection",), "mlp+attention": ("mlp", "projection")}
    if isinstance(targets, str) and targets in wanted:
        found = [site for site in known.values() if site.kind in wanted[targets]]
        if not found:
            raise TypeError(f"targets: {type(model).__name__} has no part that can be replaced as {targets!r}")
        return tuple(found)
    names = [targets] if isinstance(targets, str) else list(targets)
    if not names:
        raise InputError("targets: got none, expected 'mlp', 'mlp+attention' or names of modules")
    chosen: dict[str, Site] = {}
    for name in names:
        for site in _named(model, name, known, refs):
            chosen[site.path] = site
    order = [path for path, _ in model.named_modules()]
    return tuple(sorted(chosen.values(), key=lambda site: order.index(site.path)))


def site_activation(model: nn.Module, site: Site) -> str | None:
    """Name of the activation in a plain feed-forward part, as `nn.adaptive.ACTIVATIONS` has it; None if unknown."""
    if not site.activation:
        return None
    return _ACTIVATIONS.get(type(model.get_submodule(site.activation)).__name__)


def _named(model: nn.Module, name: str, known: dict[str, Site], refs: Sequence[LayerRef]) -> list[Site]:
    paths = [path for path, _ in model.named_modules() if path and (path == name or path.endswith(f".{name}"))]
    if not paths:
        raise unknown_name("module", name, [path for path, _ in model.named_modules() if path], "targets")
    entries = {site.passed[0]: site for site in known.values() if site.passed}
    inside = {ref.path: ref for ref in refs}
    found = []
    for path in paths:
        site = known.get(path) or entries.get(path) or _square(model, path, inside.get(path))
        if site is None:
            module = model.get_submodule(path)
            raise TypeError(
                f"targets: {path} ({type(module).__name__}) is neither a feed-forward part of one tensor nor a linear "
                "layer with as many features out as in"
            )
        found.append(site)
    return found


def _square(model: nn.Module, path: str, ref: LayerRef | None) -> Site | None:
    """A linear layer d -> d of any place: nothing is known about what goes around it."""
    sides = linear_sides(model.get_submodule(path))
    if sides is None or sides[0] != sides[1] or (ref is not None and (ref.layout == "none" or ref.tied)):
        return None
    return Site(path, (path,), sides[0] * sides[1], sides[1], sides[0], "projection", residual=False)


def _all_sites(model: nn.Module, refs: Sequence[LayerRef]) -> dict[str, Site]:
    """Every site of every block by path, in the model's order."""
    by_block: dict[tuple[str, int], list[LayerRef]] = {}
    for ref in refs:
        if ref.block is not None:
            by_block.setdefault((ref.stack, ref.block), []).append(ref)
    found: dict[str, Site] = {}
    for inside in by_block.values():
        found |= {ref.path: _projection(ref) for ref in inside if _replaceable(ref) and ref.role in _PROJECTIONS}
        mlps = [ref for ref in inside if ref.kind == "mlp"]
        outer = [m for m in mlps if not any(m.path.startswith(f"{other.path}.") for other in mlps)]
        sites = [_module_site(model, mlp.path, inside) for mlp in outer] or [_scattered(model, inside)]
        found |= {site.path: site for site in sites if site is not None}
    return found


def _replaceable(ref: LayerRef) -> bool:
    return ref.kind == "linear" and ref.layout in ("linear", "conv1d") and ref.count == 1 and not ref.tied


def _projection(ref: LayerRef) -> Site:
    out, in_ = ref.shape
    return Site(ref.path, (ref.path,), out * in_, in_, out, "projection", residual=ref.role == "o")


def _module_site(model: nn.Module, path: str, inside: Sequence[LayerRef]) -> Site | None:
    """The feed-forward part that is the one module at `path`."""
    own = [ref for ref in inside if ref.path.startswith(f"{path}.") and ref.kind != "norm"]
    layers = _feed_forward(own)
    if layers is None or len(layers) != len(own) or not _takes_one(model.get_submodule(path)):
        return None
    activation = "" if len(layers) > 2 else _between(model, path)
    return _mlp(path, layers, (), activation)


def _scattered(model: nn.Module, inside: Sequence[LayerRef]) -> Site | None:
    """A feed-forward part whose two layers stand in modules of their own (BERT), or in the block itself (BART)."""
    layers = _feed_forward(inside)
    block = next((ref.path for ref in inside if ref.kind == "block"), None)
    if layers is None or len(layers) != 2 or block is None:
        return None
    up, down = layers
    above, below = up.path.rpartition(".")[0], down.path.rpartition(".")[0]
    if above == below == block:
        activation = _between(model, block)
        return _mlp(down.path, layers, (up.path, activation), activation) if activation else None
    if block in (above, below) or above == below or not _takes_one(model.get_submodule(above)):
        return None
    alone = [ref for ref in inside if ref.path.startswith(f"{above}.")] == [up]
    return _mlp(down.path, layers, (above,), _between(model, above)) if alone else None


def _feed_forward(refs: Sequence[LayerRef]) -> list[LayerRef] | None:
    """Up (and gate), then down, if these are what is there and their sides agree."""
    ups = [ref for ref in refs if ref.role in ("up", "gate", "gate_up")]
    downs = [ref for ref in refs if ref.role == "down"]
    if not ups or len(downs) != 1 or not all(_replaceable(ref) for ref in [*ups, *downs]):
        return None
    if any(ref.shape[1] != downs[0].shape[0] for ref in ups):
        return None
    return [*ups, downs[0]]


def _mlp(path: str, layers: Sequence[LayerRef], passed: tuple[str, ...], activation: str) -> Site:
    width = layers[-1].shape[0]
    weights = sum(ref.shape[0] * ref.shape[1] for ref in layers)
    return Site(path, tuple(ref.path for ref in layers), weights, width, width, "mlp", True, passed, activation)


def _takes_one(module: nn.Module) -> bool:
    """Whether its forward needs one argument and no more."""
    if isinstance(module, nn.Sequential):
        return True
    parameters = list(inspect.signature(module.forward).parameters.values())
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1


def _between(model: nn.Module, path: str) -> str:
    """Path of the one activation directly in the module at `path`, ``""`` if there is none or several."""
    found = [
        f"{path}.{name}"
        for name, child in model.get_submodule(path).named_children()
        if not list(child.children())
        and not list(child.parameters())
        and not any(word in type(child).__name__ for word in _DOES_NOTHING)
    ]
    return found[0] if len(found) == 1 else ""
