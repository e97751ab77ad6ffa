"""Treatments: what can be done to a layer, as frozen data that travels through YAML."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from layerwright.core.errors import InputError, PlanError, unknown_name
from layerwright.core.row_ranges import rows_from_text, rows_to_text

__all__ = [
    "TREATMENTS",
    "Drop",
    "FactorConv",
    "LowRank",
    "MixRows",
    "Quantize",
    "RoundActivations",
    "RoundAttention",
    "Sparsify",
    "Treatment",
    "Treatments",
    "describe",
    "treatments_from_data",
    "treatments_to_data",
    "weight_treatments",
]


@dataclass(frozen=True)
class Treatment:
    """Base of all treatments. A subclass sets `tag` (its YAML key) and its `rank` (order of application)."""

    tag: ClassVar[str] = ""
    rank: ClassVar[int] = 0
    scope: ClassVar[Literal["weight", "block", "attention"]] = "weight"

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
        _check_width(self.bits)
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
class RoundActivations(Treatment):
    """Round what a layer reads to a grid of few bits, with ranges from the calibration.

    Attributes:
        bits: 2 to 8.
        grid: `uniform`, or `two_region` for long tails such as the output of GELU (Tai et al., 2023).
        share: one scale per `tensor` or `channel` from the calibration, or per `token` as it comes.
        symmetric: no zero point.
        observer: how a range is chosen: `minmax`; `mse` (least squared error); `percentile` (the best of three, Li et
            al., 2023); `output` (least squared error of the layer's output).
    """

    tag: ClassVar[str] = "activations"
    rank: ClassVar[int] = 40
    bits: int = 8
    grid: Literal["uniform", "two_region"] = "uniform"
    share: Literal["tensor", "channel", "token"] = "tensor"
    symmetric: bool = False
    observer: Literal["minmax", "mse", "percentile", "output"] = "mse"

    def __post_init__(self) -> None:
        _check_width(self.bits)
        if self.grid == "two_region" and (self.share != "tensor" or self.bits < 3):
            raise InputError("grid: two_region needs share: tensor and at least 3 bits (one says which region)")

    def label(self) -> str:
        """A short name for tables and charts."""
        return f"a{self.bits}{'' if self.grid == 'uniform' else ' two-region'}"


@_known
@dataclass(frozen=True)
class RoundAttention(Treatment):
    """Round what the two products of an attention module read: query, key, probabilities, value.

    Attributes:
        bits: of all four, 2 to 8.
        probabilities: grid of the probabilities: `uniform`, `log2`, `log_sqrt2` (Li et al., 2023) or `two_region`.
        key_bits: of query and key, where other than `bits`.
        observer: see `RoundActivations`.
    """

    tag: ClassVar[str] = "attention"
    rank: ClassVar[int] = 40
    scope: ClassVar[Literal["weight", "block", "attention"]] = "attention"
    bits: int = 8
    probabilities: Literal["uniform", "log2", "log_sqrt2", "two_region"] = "uniform"
    key_bits: int | None = None
    observer: Literal["minmax", "mse", "percentile"] = "mse"

    def __post_init__(self) -> None:
        _check_width(self.bits)
        if self.key_bits is not None:
            _check_width(self.key_bits, "key_bits")
        if self.probabilities == "two_region" and self.bits < 3:
            raise InputError(f"bits: got {self.bits}, two regions need at least 3 (one bit says which region)")

    def label(self) -> str:
        """A short name for tables and charts."""
        key = "" if self.key_bits in (None, self.bits) else f"/{self.key_bits}"
        return f"attention a{self.bits}{key} {self.probabilities}"


def _check_width(bits: object, name: str = "bits") -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise InputError(f"{name}: got {bits!r}, expected a whole number from 2 to 8")


@_known
@dataclass(frozen=True)
class MixRows(Treatment):
    """Store some output rows of a linear layer in more bits than the others (Zheng et al., 2024, MixLLM).

    Rows of 8 bits have no zero point, narrower ones have one.

    Attributes:
        bits: width of the rows that are not listed, 2 to 8.
        rows: width to the rows that get it, such as ``8: 0-3 17`` or ``8: 0-3; 6: 9``.
        group_size: weights that share a scale along the input dimension; -1 is one scale per row.
        method: `gptq` (with the range of each group chosen by its outputs) or `rtn` (round to nearest).
        clip: whether `gptq` may shrink the range of a group.
        act_bits: 8 rounds the input for each token and group of inputs as it comes, and multiplies integers; None
            computes in floating point.
    """

    tag: ClassVar[str] = "mix_rows"
    rank: ClassVar[int] = 30
    bits: int = 4
    rows: str = ""
    group_size: int = 128
    method: Literal["rtn", "gptq"] = "gptq"
    clip: bool = True
    act_bits: int | None = 8

    def __post_init__(self) -> None:
        found = rows_from_text(self.rows)
        for width in (self.bits, *found):
            _check_width(width)
        if self.bits in found:
            raise InputError(f"rows: {self.bits} bits is the width of the rows that are not listed; leave them out")
        if self.group_size != -1 and self.group_size < 1:
            raise InputError(f"group_size: got {self.group_size}, expected a positive number, or -1 for per channel")
        if self.act_bits not in (None, 8):
            raise InputError(f"act_bits: got {self.act_bits}, expected 8 or none")
        object.__setattr__(self, "rows", rows_to_text(found))

    def widths(self, out: int) -> dict[int, tuple[int, ...]]:
        """Width to its rows, from the largest on; together each of `out` rows once.

        Raises:
            InputError: a row that the layer does not have.
        """
        found = dict(rows_from_text(self.rows))
        last = max((rows[-1] for rows in found.values()), default=-1)
        if last >= out:
            raise InputError(f"rows: row {last} is listed, and the layer has rows 0 to {out - 1}")
        listed = {row for rows in found.values() for row in rows}
        rest = tuple(row for row in range(out) if row not in listed)
        return dict(sorted({**found, **({self.bits: rest} if rest else {})}.items(), reverse=True))

    def part(self, bits: int) -> Quantize:
        """How the rows of that width are stored."""
        return Quantize(bits, self.group_size, symmetric=bits == 8, method=self.method)

    def label(self) -> str:
        """A short name for tables and charts."""
        more = "".join(f" {len(rows)} rows int{width}" for width, rows in rows_from_text(self.rows).items())
        group = "" if self.group_size == -1 else f" g{self.group_size}"
        return f"int{self.bits}{' a8' if self.act_bits else ''}{group}{' +' + more if more else ''} {self.method}"


@_known
@dataclass(frozen=True)
class FactorConv(Treatment):
    """Replace a convolution by a chain of smaller ones (Yu and Bouganis, 2023, Mixed-TD).

    Attributes:
        inner: the rank, in each group; at least 1.
        method: `svd` of one unfolding, or `cp` (a sum of products of four vectors).
        scheme: unfolding of the SVD: 2 splits the kernel's columns from its rows; 4 puts the whole kernel first, over
            `groups` of inputs; 5 puts it last, over `groups` of outputs.
        groups: of inputs (scheme 4) or outputs (scheme 5) that are decomposed each by itself.
        kernel_height, kernel_width: of the layer; a weight that is seen as a matrix does not tell them.
    """

    tag: ClassVar[str] = "factor_conv"
    rank: ClassVar[int] = 10
    inner: int = 8
    method: Literal["svd", "cp"] = "svd"
    scheme: Literal[2, 4, 5] = 4
    groups: int = 1
    kernel_height: int = 3
    kernel_width: int = 3

    def __post_init__(self) -> None:
        for name in ("inner", "groups", "kernel_height", "kernel_width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: got {value!r}, expected a whole number of at least 1")
        if self.method not in ("svd", "cp") or self.scheme not in (2, 4, 5):
            raise InputError(
                f"factor_conv: got method {self.method!r}, scheme {self.scheme!r}; expected svd or cp, and 2, 4 or 5"
            )
        if self.groups > 1 and (self.method == "cp" or self.scheme == 2):
            raise InputError(f"groups: got {self.groups}, only the schemes 4 and 5 of svd have groups")

    def label(self) -> str:
        """A short name for tables and charts."""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"cp rank {self.inner}" if self.method == "cp" else f"svd-{self.scheme} rank {self.inner}{groups}"


@_known
@dataclass(frozen=True)
class Drop(Treatment):
    """Remove the whole block: its input passes on unchanged."""

    tag: ClassVar[str] = "drop"
    scope: ClassVar[Literal["weight", "block", "attention"]] = "block"


def weight_treatments(treatments: Treatments) -> Treatments:
    """Those that change the layer's weight, not what it reads and not whether it is there."""
    return tuple(t for t in treatments if t.scope == "weight" and not isinstance(t, RoundActivations))


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
