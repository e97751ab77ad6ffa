"""Find the repeated blocks of any model from its structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import nn

from layerwright.core.errors import InputError, unknown_name

__all__ = ["Blocks", "find_blocks", "tower"]

_SIMILAR = 0.5
_STAGE_REST = 2
_ORDER = {"vision": 0, "stage": 0, "encoder": 1, "decoder": 2}


@dataclass(frozen=True)
class Blocks:
    """An ordered stack of blocks.

    Attributes:
        path: qualified name of the list that holds them, ``""`` if the model itself does or no one list holds them all.
        names: qualified names of the blocks, in order of execution.
        role: ``encoder``; ``decoder`` (causal, or called so); ``vision`` (the image encoder of a model that also has
            a stack for text); ``stage`` (one of several stages, mostly of different widths).
        group: path of the list of stages that a stage stands in, None for the other roles.
    """

    path: str
    names: tuple[str, ...]
    role: str = "encoder"
    group: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def modules(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The block modules of `model`, in order."""
        return tuple(model.get_submodule(name) for name in self.names)


def find_blocks(model: nn.Module, override: str | Sequence[str] | None = None) -> tuple[Blocks, ...]:
    """The stacks of blocks of `model`, in order of execution: image before text, encoder before decoder.

    A stack is an outermost ``ModuleList``, ``Sequential`` or numbered ``ModuleDict`` whose children hold two weights
    or more each and are alike (one class, one base class of their own, or mostly the same parameter names). A list
    whose children are little more than such stacks themselves is a list of stages: the stages are taken. Failing
    that, lists of one weight with norms are taken, and failing that, the weight-bearing layers of plain lists, save
    the model's last layer. Only names and shapes are read, so models on the meta device work.

    Args:
        model: any module.
        override: instead of searching: a path of a list (several with commas in between, ``""`` for the model itself),
            or the paths of the blocks; a sequence of ``ModuleList`` paths gives one stack for each.

    Raises:
        TypeError: `model` is not a module.
        InputError: nothing was found, or `override` names something that is not there.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if override is not None:
        return _with_roles(model, _given(model, override))
    candidates = _search(model, "")
    found = [c for c in candidates if c.weights >= 2] or [c for c in candidates if c.weights == 1]
    stacks = [c.blocks for c in found] or _plain_stacks(model)
    if not stacks:
        raise InputError(
            f"blocks: found no list of repeated blocks in {type(model).__name__}; "
            "name it with blocks='path.of.the.list', or name the blocks with blocks=['first', 'second', ...]"
        )
    return _with_roles(model, stacks)


def tower(stack: Blocks, stacks: Sequence[Blocks]) -> str:
    """Path of the largest module around `stack` that holds no stack but it and the stages of its own group."""
    others = [s.path for s in stacks if s is not stack and (s.group is None or s.group != stack.group)]
    path = stack.path if stack.group is None else stack.group
    while path and not any(_inside(other, path.rpartition(".")[0]) for other in others):
        path = path.rpartition(".")[0]
    return path


@dataclass(frozen=True)
class _Candidate:
    blocks: Blocks
    weights: int


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(outer + ".")


def _own_weights(module: nn.Module) -> int:
    """Matrices (or larger) that `module` itself holds, without tokens and position tables of shape ``(1, ...)``.

    A packed weight, held as saved buffers, counts as one.
    """
    parameters = sum(p is not None and p.dim() >= 2 and p.shape[0] > 1 for p in module._parameters.values())
    if parameters:
        return parameters
    temporary = module._non_persistent_buffers_set
    return int(any(b is not None and b.dim() >= 2 and name not in temporary for name, b in module._buffers.items()))


def _weights(module: nn.Module) -> int:
    return sum(_own_weights(m) for m in module.modules())


def _owners(module: nn.Module) -> int:
    return sum(any(p is not None for p in m._parameters.values()) or _own_weights(m) > 0 for m in module.modules())


def _composite(module: nn.Module) -> int:
    """2 if `module` holds two weights or more, 1 if one and something else (a norm), 0 if it is no block."""
    weights = _weights(module)
    if weights >= 2:
        return 2
    return int(weights == 1 and _owners(module) >= 2)


def _tensor_names(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in module.named_parameters()) | {name for name, _ in module.named_buffers()}


def _alike(modules: Sequence[nn.Module]) -> bool:
    """Of one class, or of one base class that is not torch's own."""
    first, *rest = modules
    shared = set(type(first).__mro__).intersection(*(type(m).__mro__ for m in rest)) if rest else {type(first)}
    own = {c for c in shared if not c.__module__.startswith("torch.nn") and c is not object}
    return bool(own) or all(type(m) is type(first) for m in rest) or _same_names(modules)


def _same_names(modules: Sequence[nn.Module]) -> bool:
    """Consecutive modules share at least half of their parameter names."""
    names = [_tensor_names(m) for m in modules]
    return all(len(a & b) >= _SIMILAR * max(len(a | b), 1) for a, b in pairwise(names))


def _children(module: nn.Module, single: bool) -> list[tuple[str, nn.Module, int]]:
    """``(name, child, 1 or 2)`` of the composite children of a list; empty if `module` is no list.

    A ``Sequential`` needs two of them, or, where `single` allows it, one and nothing else.
    """
    if isinstance(module, nn.ModuleDict):
        if not all(name.isdigit() for name in module):
            return []
    elif not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return []
    graded = [(name, child, _composite(child)) for name, child in module.named_children()]
    children = [(name, child, grade) for name, child, grade in graded if grade]
    needed = 2 if isinstance(module, nn.Sequential) and not (single and len(graded) == 1) else 1
    return children if len(children) >= needed else []


def _search(module: nn.Module, path: str, single: bool = False) -> list[_Candidate]:
    """Outermost candidates under `module`, in order of registration."""
    children = _children(module, single)
    if children and _alike([child for _, child, _ in children]):
        return _resolve(path, children)
    return [c for name, child in module.named_children() for c in _search(child, _join(path, name), single)]


def _resolve(path: str, children: list[tuple[str, nn.Module, int]]) -> list[_Candidate]:
    """The list at `path` itself, or the stages in it if its children are little more than stacks."""
    nested = [_stages(child, _join(path, name), False) for name, child, _ in children]
    if any(nested) and not all(nested):  # a stage of one block hides in a Sequential of one: look again
        nested = [_stages(child, _join(path, name), True) for name, child, _ in children]
    if all(nested):
        group = path if len(children) > 1 else None
        return [replace(c, blocks=replace(c.blocks, group=group)) for inner in nested for c in inner]
    names = tuple(_join(path, name) for name, _, _ in children)
    return [_Candidate(Blocks(path, names), min(grade for _, _, grade in children))]


def _stages(module: nn.Module, path: str, single: bool) -> list[_Candidate]:
    """The stacks that make up `module`, empty if it is a block of its own."""
    found = [c for c in _search(module, path, single) if c.weights >= 2]
    found = [c for c in found if _runs_in_sequence(module, path, c.blocks)]
    inside = sum(_weights(module.get_submodule(name[len(path) + 1 :])) for c in found for name in c.blocks)
    bare = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return found if bare or _weights(module) - inside <= _STAGE_REST else []


def _runs_in_sequence(module: nn.Module, path: str, stack: Blocks) -> bool:
    """Not the experts of a mixture (their owner holds a router with one row for each), nor unlike parts of a block."""
    blocks = [module.get_submodule(name[len(path) + 1 :]) for name in stack.names]
    owner_path = stack.path.rpartition(".")[0]
    owner = module.get_submodule(owner_path[len(path) + 1 :]) if len(owner_path) > len(path) else module
    beside = [owner, *(child for name, child in owner.named_children() if _join(owner_path, name) != stack.path)]
    rows = (p.shape[0] for m in beside for p in m._parameters.values() if p is not None and p.dim() == 2)
    return _same_names(blocks) and not (len(blocks) > 1 and len(blocks) in rows)


def _plain_stacks(model: nn.Module) -> list[Blocks]:
    """Weight-bearing layers of the outermost plain lists, without the model's last one, which is its head."""
    bearing = [name for name, m in model.named_modules() if _own_weights(m)]
    last = bearing[-1] if bearing else ""

    def search(module: nn.Module, path: str) -> Iterator[Blocks]:
        named = [(_join(path, name), child) for name, child in module.named_children()]
        layers = [name for name, child in named if _weights(child) and not isinstance(child, nn.Embedding)]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(layers) >= 2:
            yield Blocks(path, tuple(name for name in layers if not _inside(last, name)))
            return
        for name, child in named:
            yield from search(child, name)

    return list(search(model, ""))


def _given(model: nn.Module, override: str | Sequence[str]) -> list[Blocks]:
    """The stacks that a user named."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [part.strip() for part in override.split(",")] if isinstance(override, str) else list(override)
    if not paths:
        raise InputError("blocks: got an empty sequence, expected the path of a list or the paths of blocks")
    for path in paths:
        if path not in modules:
            raise unknown_name("path", path, modules, "blocks")
    lists = isinstance(override, str) or all(isinstance(modules[p], (nn.ModuleList, nn.ModuleDict)) for p in paths)
    if lists:
        return [_list_at(modules[path], path) for path in paths]
    if len(set(map(id, (modules[path] for path in paths)))) < len(paths):
        raise InputError(f"blocks: {', '.join(paths)} name one module twice; name each block once")
    parents = {path.rpartition(".")[0] for path in paths}
    return [Blocks(parents.pop() if len(parents) == 1 else "", tuple(paths))]


def _list_at(module: nn.Module, path: str) -> Blocks:
    names = tuple(_join(path, name) for name, child in module.named_children() if _owners(child))
    if not names:
        raise InputError(f"blocks: {path or 'the model'} ({type(module).__name__}) has no children with parameters")
    return Blocks(path, names)


def _with_roles(model: nn.Module, stacks: Sequence[Blocks]) -> tuple[Blocks, ...]:
    towers = [tower(stack, stacks) for stack in stacks]
    images = [_outside(model, root, stack, (nn.Conv2d, nn.Conv3d)) for root, stack in zip(towers, stacks, strict=True)]
    texts = [_outside(model, root, stack, nn.Embedding) for root, stack in zip(towers, stacks, strict=True)]
    mixed = any(text and not image for text, image in zip(texts, images, strict=True))
    generates = getattr(model, "can_generate", None)
    last = stacks[-1] if callable(generates) and generates() else None

    def role(stack: Blocks, image: bool) -> str:
        if stack.group is not None:
            return "stage"
        if mixed and image:
            return "vision"
        return "decoder" if stack is last or "decoder" in stack.path.split(".") or _causal(model, stack) else "encoder"

    named = [replace(stack, role=role(stack, image)) for stack, image in zip(stacks, images, strict=True)]
    return tuple(sorted(named, key=lambda stack: _ORDER[stack.role]))


def _outside(model: nn.Module, root: str, stack: Blocks, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    """Whether the tower at `root` holds a layer of those `kinds` outside its blocks."""
    named = model.get_submodule(root).named_modules()
    inner = stack.path if stack.group is None else stack.group
    return any(isinstance(m, kinds) and not _inside(_join(root, name), inner) for name, m in named)


def _causal(model: nn.Module, stack: Blocks) -> bool:
    modules = (m for block in stack.modules(model) for m in block.modules())
    return any(getattr(m, name, None) is True for m in modules for name in ("is_decoder", "is_causal"))
