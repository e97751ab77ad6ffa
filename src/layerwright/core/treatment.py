"""Treatments: what can be done to a layer, as frozen data that travels through YAML."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from layerwright.core.errors import InputError, PlanError, unknown_name

__all__ = [
    "TREATMENTS",
    "Drop",
    "LowRank",
    "Quantize",
    "Sparsify",
    "Treatment",
    "Treatments",
    "describe",
    "treatments_from_data",
    "treatments_to_data",
]


@dataclass(frozen=True)
class Treatment:
    """Base of all treatments. A subclass sets `tag` (its YAML key) and its `rank` (order of application)."""

    tag: ClassVar[str] = ""
    rank: ClassVar[int] = 0
    scope: ClassVar[Literal["weight", "block"]] = "weight"

    def label(self) -> str:
        """A short name for tables and charts."""
        return self.tag


Treatments = tuple[Treatment, ...]
"""What one layer gets, in order of application. The empty tuple leaves the layer alone."""

TREATMENTS: dict[str, type[Treatment]] = {}
"""Treatment classes by YAML tag."""


def _known(cls: type[Treatment]) -> type[Treatment]:
    TREATMENTS[cls.tag] = cls
    return cls


@_known
@dataclass(frozen=True)
class Quantize(Treatment):
    """Store the weight as integers, and compute with integer activations where `act_bits` is set.

    Attributes:
        bits: weight bits, 2 to 8.
        group_size: weights that share a scale along the input dimension; -1 is one scale per output channel.
        symmetric: no zero point.
        method: `rtn` (round to nearest), `mse` (clip to the least squared error), `gptq` (Frantar et al., 2023).
        act_bits: None computes in floating point; 8 multiplies int8 activations with int8 weights (W8A8).
        act_mode: `dynamic` measures each token's range as it comes; `static` takes the calibration's range.
    """

    tag: ClassVar[str] = "quantize"
    rank: ClassVar[int] = 30
    bits: int = 4
    group_size: int = -1
    symmetric: bool = True
    method: Literal["rtn", "mse", "gptq"] = "gptq"
    act_bits: int | None = None
    act_mode: Literal["dynamic", "static"] = "dynamic"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise InputError(f"bits: got {self.bits!r}, expected a whole number from 2 to 8")
        if self.group_size != -1 and self.group_size < 1:
            raise InputError(f"group_size: got {self.group_size}, expected a positive number, or -1 for per channel")
        if self.act_bits not in (None, 8):
            raise InputError(f"act_bits: got {self.act_bits}, expected 8 or none")
        if self.act_bits == 8 and (self.bits != 8 or self.group_size != -1 or not self.symmetric):
            raise InputError("act_bits: 8 needs bits: 8, group_size: -1 and symmetric: true (integer products)")

    def label(self) -> str:
        """A short name for tables and charts."""
        group = "" if self.group_size == -1 else f" g{self.group_size}"
        acts = f" a{self.act_bits}" if self.act_bits else ""
        return f"int{self.bits}{acts}{group}{'' if self.symmetric else ' asym'} {self.method}"


@_known
@dataclass(frozen=True)
class Sparsify(Treatment):
    """Set a share of the weights to zero and store the others with a bit mask.

    Attributes:
        sparsity: share of zeros, 0 to 1 (exclusive); must be 0.5 for the pattern `2:4`.
        pattern: `unstructured`, or `2:4` (two of every four along the input dimension).
        method: `magnitude`, `wanda` (Sun et al., 2023) or `sparsegpt` (Frantar and Alistarh, 2023).
    """

    tag: ClassVar[str] = "sparsify"
    rank: ClassVar[int] = 20
    sparsity: float = 0.5
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise InputError(f"sparsity: got {self.sparsity}, expected a share between 0 and 1")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise InputError(f"sparsity: got {self.sparsity}, the pattern 2:4 is always 0.5")

    def label(self) -> str:
        """A short name for tables and charts."""
        return f"2:4 {self.method}" if self.pattern == "2:4" else f"sparse {self.sparsity:.0%} {self.method}"


@_known
@dataclass(frozen=True)
class LowRank(Treatment):
    """Replace the weight by a product of two thin matrices.

    Attributes:
        inner: the rank, that is the inner dimension of the product; at least 1.
        method: `svd` (least squared weight error) or `activation` (least squared output error on the calibration).
    """

    tag: ClassVar[str] = "low_rank"
    rank: ClassVar[int] = 10
    inner: int = 8
    method: Literal["svd", "activation"] = "activation"

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise InputError(f"inner: got {self.inner}, expected a rank of at least 1")

    def label(self) -> str:
        """A short name for tables and charts."""
        return f"rank {self.inner}"


@_known
@dataclass(frozen=True)
class Drop(Treatment):
    """Remove the whole block: its input passes on unchanged."""

    tag: ClassVar[str] = "drop"
    scope: ClassVar[Literal["weight", "block"]] = "block"


def describe(treatments: Treatments) -> str:
    """`int4 g32 gptq`, `rank 24 + int8 rtn`, ... or `kept`."""
    return " + ".join(t.label() for t in treatments) or "kept"


def treatments_to_data(treatments: Treatments) -> dict[str, Any]:
    """Plain data for YAML and JSON: ``{tag: {field: value}}``, every field written."""
    return {t.tag: dataclasses.asdict(t) for t in treatments}


def treatments_from_data(data: Any, where: str = "treatment") -> Treatments:
    """Read what `treatments_to_data` wrote, or a person did; unknown tags and fields are refused by name.

    Accepts a mapping ``{tag: {field: value} | None}``, a bare tag (``drop``), or ``keep``.
    """
    if data is None or data == "keep" or data == {}:
        return ()
    if isinstance(data, str):
        data = {data: None}
    if not isinstance(data, Mapping):
        raise PlanError(f"{where}: got {data!r}, expected a mapping such as {{quantize: {{bits: 4}}}}")
    found = [_one_from_data(tag, fields, where) for tag, fields in data.items()]
    if len(found) > 1 and any(t.scope == "block" for t in found):
        raise PlanError(f"{where}: {describe(tuple(found))} contradict each other: a dropped block takes nothing else")
    return tuple(sorted(found, key=lambda t: t.rank))


def _one_from_data(tag: Any, fields: Any, where: str) -> Treatment:
    if tag not in TREATMENTS:
        raise unknown_name("treatment", str(tag), TREATMENTS, where)
    cls = TREATMENTS[tag]
    hints = _hints(tag)
    if fields is not None and not isinstance(fields, Mapping):
        raise PlanError(f"{where}: {tag} got {fields!r}, expected a mapping of its settings")
    for name, value in (fields or {}).items():
        if name not in hints:
            raise unknown_name(f"setting of {tag}", str(name), hints, where)
        _check_type(value, hints[name], f"{where}: {tag}.{name}")
    try:
        return cls(**(fields or {}))
    except InputError as error:
        raise PlanError(f"{where}: {error}") from error


@functools.cache
def _hints(tag: str) -> dict[str, Any]:
    """Type of each setting; worked out once, since a file of scores asks for it ten thousand times."""
    hints = get_type_hints(TREATMENTS[tag])
    return {f.name: hints[f.name] for f in dataclasses.fields(TREATMENTS[tag])}


def _check_type(value: Any, hint: Any, where: str) -> None:
    options = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in options:
            raise unknown_name("value", str(value), map(str, options), where)
        return
    kinds = tuple(o for o in options if isinstance(o, type)) if options else (hint,)
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("none" if k is type(None) else k.__name__ for k in kinds)
        raise PlanError(f"{where}: got {value!r}, expected {names}")
