"""Errors in one clear line: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType

__all__ = [
    "BudgetError",
    "CheckError",
    "CheckpointError",
    "InputError",
    "LayerwrightError",
    "MissingExtraError",
    "NotFiniteError",
    "PlanError",
    "require_extra",
    "unknown_name",
]


class LayerwrightError(Exception):
    """Base of the package's own errors. The message is one line a user can act on."""


class InputError(LayerwrightError, ValueError):
    """A value that was given cannot be used."""


class BudgetError(InputError):
    """A budget that is malformed or cannot be reached."""


class PlanError(InputError):
    """A plan that is malformed, contradictory, or belongs to another model; `problems` lists several one by one."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems) or (message,)
        super().__init__(message)


class CheckpointError(InputError):
    """A checkpoint that cannot be read or written."""


class NotFiniteError(CheckpointError):
    """A checkpoint whose weights hold NaN or infinite values."""


class CheckError(InputError):
    """Several problems, found before any weight was loaded and reported together."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class MissingExtraError(LayerwrightError, ImportError):
    """An optional package is needed and not installed."""


def unknown_name(kind: str, given: str, known: Iterable[str], where: str = "") -> InputError:
    """An error for a name that is not known: lists close matches first, else everything that is known."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names[:40])}"
    at = f" in {where}" if where else ""
    return InputError(f"unknown {kind} {given!r}{at}; {hint}")


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional `module` or raise `MissingExtraError` that names the `extra` to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MissingExtraError(f"this needs {package}: pip install 'layerwright[{extra}]' ({error})") from error
