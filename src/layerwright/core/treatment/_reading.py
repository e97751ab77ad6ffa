"""Treatments as plain data, and what a person wrote as treatments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from layerwright.core.errors import InputError, PlanError, unknown_name
from layerwright.core.treatment._activations import RoundActivations
from layerwright.core.treatment._base import TREATMENTS, Treatment, Treatments

__all__ = ["describe", "treatments_from_data", "treatments_to_data", "weight_treatments"]


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
