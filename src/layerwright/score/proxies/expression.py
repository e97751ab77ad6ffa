"""A proxy as an expression over layer statistics: genotype, string form, canonical form, value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from layerwright.core.errors import InputError, unknown_name
from layerwright.score.proxies.operations import BINARY, COMMUTATIVE, NOT_NEGATIVE, UNARY, apply_operation, arity
from layerwright.score.proxies.statistics import STATISTICS, LayerStatistics
from layerwright.score.proxies.weighting import WEIGHTINGS, Weighting, bit_weights

__all__ = ["STRUCTURES", "ProxyTree", "Step", "Structure"]

Structure = Literal["linear", "tree", "dag"]
STRUCTURES: tuple[Structure, ...] = ("linear", "tree", "dag")
"""A chain of unary operations; two chains of two joined by a binary operation; any wiring."""

Step = tuple[str, tuple[int, ...]]
"""An operation and the numbers of the nodes it reads: inputs first, then earlier steps."""
_Nested = Any
"""``"V"`` or ``(operation, operand, ...)``."""

_TREE = ((0,), (2,), (1,), (4,), (3, 5))
"""What the five steps of a branched tree read."""


@dataclass(frozen=True)
class ProxyTree:
    """A score of a layer that gets ``b`` bits: ``b`` times the mean of an expression over the layer's statistics.

    The value of a vector of bits is the sum over layers, so it is linear in the bits (Dong et al., EMQ, 2023). With
    the weighting ``rounding``, minus the rounding error of the layer's weights takes the place of ``b``.

    Attributes:
        structure: how the steps are wired.
        inputs: names of statistics; see `LayerStatistics`.
        steps: operations in order; the last one is the result.
        weighting: how bits enter; see `bit_weights`.

    Raises:
        InputError: unknown names, a step that reads a node that is not there yet, a wiring that is not the structure's.
    """

    structure: Structure
    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    weighting: Weighting = "bits"

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise unknown_name("weighting", str(self.weighting), WEIGHTINGS, "a proxy")
        if self.structure not in STRUCTURES:
            raise unknown_name("structure", str(self.structure), STRUCTURES, "a proxy")
        if not self.inputs:
            raise InputError("a proxy needs at least one input, such as W")
        for name in self.inputs:
            if name not in STATISTICS:
                raise unknown_name("input", name, STATISTICS, "a proxy")
        for number, (name, sources) in enumerate(self.steps):
            if arity(name) != len(sources):
                raise InputError(f"{name}: got {len(sources)} operands, expected {arity(name)}")
            if not all(0 <= source < len(self.inputs) + number for source in sources):
                raise InputError(f"{name}: step {number} reads {sources}, expected inputs or earlier steps")
        wiring = tuple(sources for _, sources in self.steps)
        chain = tuple((number,) for number in range(len(self.steps)))
        expected = {"linear": (1, chain), "tree": (2, _TREE)}.get(self.structure)
        if expected is not None and (len(self.inputs), wiring) != expected:
            raise InputError(f"a {self.structure} proxy cannot be wired as {wiring} over {len(self.inputs)} inputs")

    # -- value ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def layer_values(self, statistics: LayerStatistics) -> np.ndarray[Any, np.dtype[np.float64]]:
        """``(layers,)`` the expression's mean for each layer, before bits; 0 where every branch is cut.

        Raises:
            InputError: a statistic that was not measured.
        """
        columns = [statistics.tensors(name) for name in self.inputs]
        values = [self._evaluate([column[layer] for column in columns]) for layer in range(len(statistics))]
        return np.array([0.0 if value is None else float(value.double().mean()) for value in values])

    def _evaluate(self, operands: Sequence[Tensor]) -> Tensor | None:
        nodes: list[Tensor | None] = list(operands)
        for name, sources in self.steps:
            present = [node for node in (nodes[source] for source in sources) if node is not None]
            if name == "disconnect" or not present:
                nodes.append(None)
            elif len(present) < len(sources):
                nodes.append(present[0])
            else:
                nodes.append(apply_operation(name, *present))
        return nodes[-1]

    def gains(self, statistics: LayerStatistics, widths: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """``(layers, widths)`` what each layer adds to the score at each width."""
        return self.layer_values(statistics)[:, None] * bit_weights(statistics, widths, self.weighting)

    def __call__(self, statistics: LayerStatistics, bits: Sequence[int]) -> float:
        """The score of one vector of bits; higher promises better.

        Raises:
            InputError: `bits` has not one entry per layer.
        """
        if len(bits) != len(statistics):
            raise InputError(f"bits: got {len(bits)} numbers, expected one for each of {len(statistics)} layers")
        widths = sorted(set(bits))
        gains, places = self.gains(statistics, widths), np.searchsorted(widths, np.asarray(bits))
        return float(gains[np.arange(len(gains)), places].sum())

    # -- forms ----------------------------------------------------------------------------------------------------

    def genotype(self) -> dict[str, Any]:
        """Plain data: ``{structure, input: [a, b], op: [[u1, u2], [u3, u4], binary]}`` for a tree; `from_genotype`
        reads it back.
        """
        names: list[Any] = [name for name, _ in self.steps]
        if self.structure == "tree":
            names = [names[:2], names[2:4], names[4]]
        elif self.structure == "dag":
            names = [[name, *sources] for name, sources in self.steps]
        weighting = {} if self.weighting == "bits" else {"weighting": self.weighting}
        return {"structure": self.structure, "input": list(self.inputs), "op": names, **weighting}

    @classmethod
    def from_genotype(cls, data: Any) -> ProxyTree:
        """Read what `genotype` wrote; a missing structure is a tree.

        Raises:
            InputError: malformed, or unknown names.
        """
        if not isinstance(data, Mapping) or not {"input", "op"} <= set(data):
            raise InputError("genotype: expected {structure, input: [...], op: [...]}")
        structure, inputs, names = data.get("structure", "tree"), tuple(map(str, data["input"])), data["op"]
        try:
            if structure == "tree":
                (first, second), (third, fourth), last = names
                steps = tuple(zip((first, second, third, fourth, last), _TREE, strict=True))
            elif structure == "dag":
                steps = tuple((str(name), tuple(int(s) for s in sources)) for name, *sources in names)
            else:
                steps = tuple((str(name), (number,)) for number, name in enumerate(names))
        except (TypeError, ValueError) as error:
            raise InputError(f"genotype: {names!r} is no list of operations of a {structure} ({error})") from error
        return cls(structure, inputs, steps, data.get("weighting", "bits"))

    def to_string(self) -> str:
        """Nested calls, such as ``product(abs(noop(G)), log(square(W)))``."""
        return _spell(self._nested())

    @classmethod
    def from_string(cls, text: str) -> ProxyTree:
        """Read nested calls; the structure is the most special one that fits.

        Raises:
            InputError: not an expression, or unknown names.
        """
        return _build(_parse(text))

    def canonical(self) -> str:
        """The same for expressions that are equal by their form.

        Idle operations and cut branches go, doubled ones count once, operands that may change places are sorted.
        """
        nested = _simplify(self._nested())
        return "0" if nested is None else _spell(nested)

    def _nested(self) -> _Nested:
        nodes: list[_Nested] = list(self.inputs)
        for name, sources in self.steps:
            nodes.append((name, *(nodes[source] for source in sources)))
        return nodes[-1]

    def __str__(self) -> str:
        return self.to_string()


def _spell(nested: _Nested) -> str:
    return nested if isinstance(nested, str) else f"{nested[0]}({', '.join(map(_spell, nested[1:]))})"


def _simplify(nested: _Nested) -> _Nested | None:
    if isinstance(nested, str):
        return nested
    name, *operands = nested
    parts = [part for part in map(_simplify, operands) if part is not None]
    if name == "disconnect" or not parts:
        return None
    if len(parts) < len(operands) or name == "noop":
        return parts[0]
    inner = "" if isinstance(parts[0], str) else parts[0][0]
    if name == "negate" and inner == "negate":
        return parts[0][1]
    if (name in ("abs", "relu") and inner in NOT_NEGATIVE) or (name == inner == "sign"):
        return parts[0]
    if name in COMMUTATIVE:
        parts.sort(key=_spell)
    return (name, *parts)


_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z_0-9]*|[(),])")


def _parse(text: str) -> _Nested:
    tokens, place = [], 0
    text = text.strip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise InputError(f"proxy {text!r}: cannot read it from {text[place : place + 20]!r} on")
        tokens.append(found[1])
        place = found.end()
    nested, rest = _read(tokens, text)
    if rest:
        raise InputError(f"proxy {text!r}: {rest[0]!r} stands behind its end")
    return nested


def _read(tokens: list[str], text: str, depth: int = 0) -> tuple[_Nested, list[str]]:
    if not tokens or tokens[0] in "()," or depth > 100:
        raise InputError(f"proxy {text!r}: expected an expression such as product(abs(G), W)")
    name, rest = tokens[0], tokens[1:]
    if rest[:1] != ["("]:
        if name in UNARY or name in BINARY:
            raise InputError(f"proxy {text!r}: the operation {name} needs operands in parentheses")
        return name, rest
    operands: list[_Nested] = []
    while rest and rest[0] in ("(", ","):
        operand, rest = _read(rest[1:], text, depth + 1)
        operands.append(operand)
    if rest[:1] != [")"]:
        raise InputError(f"proxy {text!r}: a closing parenthesis is missing behind {name}")
    return (name, *operands), rest[1:]


def _build(nested: _Nested) -> ProxyTree:
    flat: list[str] = []
    node = nested
    while not isinstance(node, str) and len(node) == 2:
        flat.append(node[0])
        node = node[1]
    if isinstance(node, str):
        return ProxyTree("linear", (node,), tuple((name, (i,)) for i, name in enumerate(reversed(flat))))
    if not flat and len(node) == 3:
        branches = [_chain(operand) for operand in node[1:]]
        if all(len(names) == 2 for names, _ in branches if names is not None) and None not in [b[0] for b in branches]:
            names = [name for own, _ in branches for name in own or ()] + [node[0]]
            return ProxyTree("tree", (branches[0][1], branches[1][1]), tuple(zip(names, _TREE, strict=True)))
    return _graph(nested)


def _chain(nested: _Nested) -> tuple[list[str] | None, str]:
    """The operations from the input on, and the input; None where it is no chain."""
    names: list[str] = []
    while not isinstance(nested, str):
        if len(nested) != 2:
            return None, ""
        names.append(nested[0])
        nested = nested[1]
    return names[::-1], nested


def _graph(nested: _Nested) -> ProxyTree:
    inputs: list[str] = []
    steps: list[tuple[str, list[_Nested]]] = []
    known: dict[str, Any] = {}

    def visit(node: _Nested) -> str:
        key = _spell(node)
        if key not in known:
            if isinstance(node, str):
                known[key] = ("input", len(inputs))
                inputs.append(node)
            else:
                keys = [visit(operand) for operand in node[1:]]
                known[key] = ("step", len(steps))
                steps.append((node[0], keys))
        return key

    visit(nested)

    def number(key: str) -> int:
        kind, place = known[key]
        return int(place) if kind == "input" else len(inputs) + int(place)

    return ProxyTree("dag", tuple(inputs), tuple((name, tuple(map(number, keys))) for name, keys in steps))
