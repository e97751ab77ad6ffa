"""Settings on the command line: ``name=value``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from layerwright.core.errors import InputError

__all__ = ["read_settings"]


def read_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Settings by name from texts ``name=value``; a value is read as YAML, such as ``3``, ``true`` or ``[a, b]``.

    Raises:
        InputError: no ``=``, a name that comes twice, or a value that is no YAML.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or not name.isidentifier():
            raise InputError(f"--set: got {pair!r}, expected name=value")
        if name in found:
            raise InputError(f"--set: {name} comes twice")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(
                f"--set: the value of {name}, {value!r}, cannot be read ({error})".splitlines()[0]
            ) from error
    return found
