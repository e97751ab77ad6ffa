"""What the parts of a block do: attention, mlp, router, and the role of each weight, from names checked by shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

__all__: list[str] = []

Shape = tuple[int, int]

_QUERY = {"q", "q_proj", "query", "q_lin", "to_q", "wq", "query_proj", "q_attn", "linear_q", "projection_query"}
_KEY = {"k", "k_proj", "key", "k_lin", "to_k", "wk", "key_proj", "linear_k", "projection_key"}
_VALUE = {"v", "v_proj", "value", "v_lin", "to_v", "wv", "value_proj", "linear_v", "projection_value"}
_FUSED = {"qkv", "qkv_proj", "query_key_value", "c_attn", "wqkv", "to_qkv", "w_pack", "qkv_linear", "in_proj_weight"}
_PROJECTS = re.compile(
    r"^(to_)?(q|k|v|kv|qk|qkv)(_|$)|^(query|key|value)(_|$)|^projection_(query|key|value)$|^linear_[qkv]$"
    r"|^w(q|k|v|qkv|_pack)$|^c_attn$|^in_proj_weight$"
)
_OUTPUT = {"o", "o_proj", "out_proj", "out_lin", "to_out", "wo", "c_proj", "proj", "out", "linear_out", "dense"}
_GATE = {"gate_proj", "w1", "wi_0", "gate", "w_gate", "linear_gate"}
_UP = {"up_proj", "w3", "wi_1", "wi", "fc1", "lin1", "linear1", "c_fc", "dense_h_to_4h", "fc_in", "pwconv1", "up"}
_UP |= {"intermediate.dense", "w1", "w_in", "w_up", "dense_in", "expand", "linear_1", "input_linear"}
_BOTH = {"gate_up_proj", "gate_up", "w12", "gate_and_up_proj"}
_MAYBE_BOTH = {"wi", "fc1", "weights_in", "input_linear", "w_in", "in_proj"}
_DOWN = {"down_proj", "w2", "wo", "fc2", "lin2", "linear2", "c_proj", "dense_4h_to_h", "fc_out", "pwconv2", "down"}
_DOWN |= {"output.dense", "w_out", "w_down", "weights_out", "output_linear", "dense_out", "contract", "linear_2"}
_GENERIC = {"dense", "linear", "proj", "layer"}
_MLP = re.compile(r"mlp|ffn|feed_?forward|(^|_)ff($|_)|moe")


@dataclass(frozen=True)
class Parts:
    """Paths of a block's parts, all relative to the model."""

    attention: frozenset[str] = frozenset()
    mlp: frozenset[str] = frozenset()
    routers: frozenset[str] = frozenset()
    roles: Mapping[str, str] = field(default_factory=dict)


def dissect(block: nn.Module, path: str, weights: Mapping[str, Shape], experts: Mapping[str, int]) -> Parts:
    """Name the parts of the block at `path`.

    Args:
        block: its module.
        path: its qualified name.
        weights: shape ``(out, in)`` by path of every matrix in it: linear layers, experts, matrices of other modules.
        experts: number of experts by path, of those in `weights` that hold experts in one parameter.
    """
    attention = _attention(block, path, weights)
    roles: dict[str, str] = {}
    for container in attention:
        roles |= _attention_roles({p: s for p, s in weights.items() if _inside(p, container)})
    rest = {p: s for p, s in weights.items() if not any(_inside(p, a) for a in attention)}
    direct = {p: s for p, s in rest.items() if _parent(p) == path}
    if any(_PROJECTS.match(_last(p)) for p in direct):  # projections that stand in the block itself
        inside = _attention_roles({p: s for p, s in direct.items() if _PROJECTS.match(_last(p)) or _is_output(p)})
        roles |= inside
        rest = {p: s for p, s in rest.items() if p not in inside}
    routers = _routers(block, path, rest, experts)
    rest = {p: s for p, s in rest.items() if p not in routers}
    width = _width(list(weights.values()))
    roles |= _mlp_roles(rest, width)
    if not attention:
        attention = _mixers(block, path)
    return Parts(frozenset(attention), frozenset(_mlps(block, path, roles, rest, attention)), routers, roles)


def _inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(outer + ".")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _leaf(path: str) -> str:
    """Last telling part of a path; a generic name takes the part before along."""
    parts = _telling(path)
    return ".".join(parts[-2:]) if parts[-1] in _GENERIC else parts[-1]


def _width(shapes: Sequence[Shape]) -> int:
    """The most frequent dimension, at a tie the first input: the width of the residual stream."""
    counts = Counter(side for shape in shapes for side in shape)
    return max(counts, key=lambda side: (counts[side], side == shapes[0][1])) if counts else 0


def _attention(block: nn.Module, path: str, weights: Mapping[str, Shape]) -> list[str]:
    """The smallest modules in the block that hold a query (or fused) projection and the output projection."""
    cores = {_parent(p) for p in weights if _PROJECTS.match(_last(p))}
    found: list[str] = []
    for core in sorted(cores - {path, _parent(path)}):
        own = [p for p in weights if _inside(p, core)]
        above = _parent(core)
        if not any(_last(p) in _OUTPUT for p in own) and above != path and _inside(above, path):
            around = [p for p in weights if _inside(p, above) and p not in own]
            core = above if len(around) == 1 else core
        if _module_at(block, path, core) and not any(_inside(core, other) for other in found):
            found.append(core)
    return found


def _last(path: str) -> str:
    return _telling(path)[-1]


def _telling(path: str) -> list[str]:
    """The parts of a path up to the last that says something: no position in a list, no bare "weight"."""
    parts = path.lower().split(".")
    while len(parts) > 1 and (parts[-1].isdigit() or parts[-1] == "weight"):
        parts.pop()
    return parts


def _module_at(block: nn.Module, path: str, inner: str) -> bool:
    """Whether `inner` is a module strictly inside the block."""
    if not _inside(inner, path) or inner == path:
        return False
    return not isinstance(block.get_submodule(inner[len(path) + 1 if path else 0 :]), (nn.ModuleList, nn.ModuleDict))


def _is_output(path: str) -> bool:
    """Named as the output projection and as nothing else."""
    return _last(path) in _OUTPUT - _DOWN - _GENERIC - {"out"}


def _attention_roles(weights: Mapping[str, Shape]) -> dict[str, str]:
    roles: dict[str, str] = {}
    has_query = any(_last(p) in _QUERY for p in weights)
    for p in weights:
        name = _last(p)
        if name in _QUERY:
            roles[p] = "q"
        elif name in _KEY:
            roles[p] = "k"
        elif name in _VALUE:
            roles[p] = "v"
        elif name in _FUSED and not has_query:
            roles[p] = "qkv"
    rest = [p for p in weights if not _PROJECTS.match(_last(p))]
    named = [p for p in rest if _last(p) in _OUTPUT] or (rest if len(rest) == 1 else [])
    if named:
        roles[named[-1]] = "o"
    return roles


def _mixers(block: nn.Module, path: str) -> list[str]:
    """Where no projections are named: the modules that know their index in the cache, that is, that mix tokens."""
    found: list[str] = []
    for name, module in block.named_modules():
        full = f"{path}.{name}" if path else name
        if name and "layer_idx" in vars(module) and not _MLP.search(name) and not any(_inside(full, f) for f in found):
            found.append(full)
    return found


def _routers(block: nn.Module, path: str, weights: Mapping[str, Shape], experts: Mapping[str, int]) -> frozenset[str]:
    """Matrices with one row for each expert, next to the experts."""
    owners = {_parent(_parent(p)): count for p, count in experts.items()}
    for name, module in block.named_modules():
        full = f"{path}.{name}" if path and name else path or name
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1 and _experts(module):
            owners[_parent(full)] = len(module)
    found = set()
    for owner, count in owners.items():
        for p, shape in weights.items():
            near = _inside(p, owner) and p.count(".") - owner.count(".") <= 2
            if near and p not in experts and shape[0] == count and _leaf(p) not in _UP | _DOWN | (_GATE - {"gate"}):
                found.add(p)
    return frozenset(found)


def _experts(modules: nn.ModuleList | nn.ModuleDict) -> bool:
    """Children of one class with equal shapes that hold a matrix: the experts of a mixture, if a router stands by."""
    shapes = [[tuple(p.shape) for p in m.parameters()] for m in modules.children()]
    return all(s == shapes[0] for s in shapes) and any(len(shape) > 1 for shape in shapes[0])


def _names(path: str) -> set[str]:
    """The names a weight may be known by: with the part before, and alone unless that says nothing."""
    return {_leaf(path), _last(path)} - _GENERIC


def _mlp_roles(weights: Mapping[str, Shape], width: int) -> dict[str, str]:
    """Roles by name where the shapes agree; two unnamed matrices that widen and narrow are up and down."""
    inner = {shape[1] for p, shape in weights.items() if shape[0] == width and _names(p) & _DOWN}
    gated = {_parent(p) for p in weights if _last(p) in {"w3", "up_proj", "wi_1", "up", "w_up"}}
    roles: dict[str, str] = {}
    for p, (out, in_) in weights.items():
        names = _names(p)
        twice = out % 2 == 0 and out // 2 in inner and out not in inner
        if in_ == width and (names & _BOTH or (names & _MAYBE_BOTH and twice)):
            roles[p] = "gate_up"
        elif in_ == width and names & _GATE and (_parent(p) in gated):
            roles[p] = "gate"
        elif in_ == width and names & _UP:
            roles[p] = "up"
        elif out == width and names & _DOWN:
            roles[p] = "down"
    return roles | _unnamed(weights, roles)


def _unnamed(weights: Mapping[str, Shape], roles: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    by_parent: dict[str, list[str]] = {}
    for p in weights:
        by_parent.setdefault(_parent(p), []).append(p)
    for paths in by_parent.values():
        if len(paths) == 2 and not any(p in roles for p in paths) and weights[paths[0]] == weights[paths[1]][::-1]:
            found |= {paths[0]: "up", paths[1]: "down"}
    return found


def _mlps(
    block: nn.Module, path: str, roles: Mapping[str, str], weights: Collection[str], attention: Collection[str]
) -> list[str]:
    """Outermost modules in the block that hold widening and narrowing weights, or are called so, and no attention."""
    ups = [p for p, role in roles.items() if role in ("up", "gate_up", "gate")]
    downs = [p for p, role in roles.items() if role == "down"]

    both, holding = _above(ups) & _above(downs), _above(weights)

    def named(module: str) -> bool:
        return module in holding and bool(_MLP.search(_last(module)))

    return _outermost(block, path, attention, both.__contains__) or _outermost(block, path, attention, named)


def _above(paths: Iterable[str]) -> set[str]:
    """All modules around these weights."""
    found: set[str] = set()
    for path in paths:
        while (path := _parent(path)) and path not in found:
            found.add(path)
    return found


def _outermost(block: nn.Module, path: str, attention: Collection[str], test: Callable[[str], bool]) -> list[str]:
    found: list[str] = []
    for name, module in block.named_modules():
        full = f"{path}.{name}" if path else name
        if not name or isinstance(module, (nn.ModuleList, nn.ModuleDict)) or any(_inside(full, f) for f in found):
            continue
        if not any(_inside(a, full) for a in attention) and test(full):
            found.append(_without_wrapper(module, full, test))
    return found


def _without_wrapper(module: nn.Module, path: str, test: Callable[[str], bool]) -> str:
    """Step into a wrapper that adds a norm or a residual connection to the one child that does everything."""
    children = [(name, c) for name, c in module.named_children() if any(p.dim() > 1 for p in c.parameters())]
    own = any(p is not None for p in module._parameters.values())
    if len(children) != 1 or own or not test(f"{path}.{children[0][0]}"):
        return path
    return _without_wrapper(children[0][1], f"{path}.{children[0][0]}", test)
