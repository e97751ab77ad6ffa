"""Devices by name or from YAML."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from layerwright.core.errors import InputError, unknown_name
from layerwright.score.device.processors import Device, Energy, Links, Processor

__all__ = ["bank_pim", "device", "device_from_data", "devices", "duplex", "h100"]

_FOLDER = Path(__file__).parent / "library"


def device_from_data(data: Any, where: str) -> Device:
    """A device from plain data: unknown fields are refused by name, numbers may be written ``3.352e12``.

    Raises:
        InputError: a field that is missing, unknown or of the wrong kind; `where` names the source.
    """
    fields = _fields(data, Device, where)
    for name, kind in (("high", Processor), ("low", Processor), ("links", Links), ("energy", Energy)):
        if fields.get(name) is not None:
            part = _fields(fields[name], kind, f"{where}: {name}")
            if kind is Processor:
                part = {"name": name, "flops": None, **part}
            fields[name] = _build(kind, part, f"{where}: {name}")
    built: Device = _build(Device, fields, where)
    return built


def devices() -> tuple[Device, ...]:
    """Every device that ships with the package."""
    return tuple(_library().values())


def device(name: str | Path | Device) -> Device:
    """The device of that name, or the one that a YAML file describes.

    Raises:
        InputError: an unknown name (close ones are listed), or a file that describes no device.
        FileNotFoundError: no such file.
    """
    if isinstance(name, Device):
        return name
    text = str(name)
    if text.endswith((".yaml", ".yml")):
        return _read(Path(text))
    if text not in _library():
        raise unknown_name("device", text, _library())
    return _library()[text]


def h100() -> Device:
    """A GPU of the H100 class: 989.4 TFLOPS, 3.352 TB/s, 80 GiB."""
    return device("h100")


def duplex() -> Device:
    """The same GPU with Logic-PIM: 13.4 TB/s and 107 TFLOPS over the same memory (Yun et al., 2024)."""
    return device("duplex")


def bank_pim() -> Device:
    """The same GPU with a processor in every bank: 53.6 TB/s and 53.6 TFLOPS."""
    return device("bank_pim")


@cache
def _library() -> dict[str, Device]:
    found = [_read(path) for path in sorted(_FOLDER.glob("*.yaml"))]
    return {item.name: item for item in found}


def _read(path: Path) -> Device:
    if not path.is_file():
        raise FileNotFoundError(f"no device file at {path}: give a YAML file, or one of {', '.join(_library())}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return device_from_data({"name": path.stem, **data} if isinstance(data, dict) else data, str(path))


def _fields(data: Any, kind: type[Any], where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: got {type(data).__name__}, expected a mapping of the fields of a {kind.__name__}")
    known = {field.name for field in dataclasses.fields(kind)}
    for name in data:
        if name not in known:
            raise unknown_name("field", str(name), known, where)
    texts = {"name", "about", "layout"}
    return {
        name: value
        if name in texts or value is None or isinstance(value, Mapping | Processor | Links | Energy)
        else _number(value, f"{where}: {name}")
        for name, value in data.items()
    }


def _number(value: Any, where: str) -> float:
    """YAML 1.1 reads ``3.352e12`` as a text, people mean a number."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number):
        raise InputError(f"{where}: got {value!r}, expected a number")
    return int(number) if number.is_integer() and not isinstance(value, float | str) else number


def _build(kind: type[Any], fields: Mapping[str, Any], where: str) -> Any:
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in fields
    ]
    if missing:
        raise InputError(f"{where}: {', '.join(missing)} missing")
    try:
        return kind(**fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
