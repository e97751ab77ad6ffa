"""Small named registries with lazy targets; other packages add to them through entry points."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from layerwright.core.errors import unknown_name

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to objects of one kind. A target is an object or ``"package.module:object"``, imported when first used.

    Entry points of the group ``layerwright.<kind>`` are found on the first look-up, so a third party adds a method
    without a change here. Registering a name twice with different targets is an error.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._targets: dict[str, T | str] = {}
        self._searched = False

    def add(self, name: str, target: T | str) -> None:
        """Register `target` under `name` (lower case, words joined by underscores or dashes)."""
        if name != name.lower() or self._targets.get(name, target) != target:
            raise ValueError(f"{self.kind} {name!r} is already registered or not lower case")
        self._targets[name] = target

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""

        def decorate(target: T) -> T:
            self.add(name, target)
            return target

        return decorate

    def get(self, name: str) -> T:
        """The object called `name`; an unknown name raises with close matches."""
        self._search()
        if name not in self._targets:
            raise unknown_name(self.kind, name, self._targets)
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            loaded: Any = getattr(importlib.import_module(module), attribute)
            self._targets[name] = loaded
            return loaded  # type: ignore[no-any-return]
        return target

    def names(self) -> list[str]:
        """All names, sorted."""
        self._search()
        return sorted(self._targets)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._search()
        return name in self._targets

    def _search(self) -> None:
        if not self._searched:
            self._searched = True
            for point in entry_points(group=f"layerwright.{self.kind.replace(' ', '_')}"):
                self._targets.setdefault(point.name, point.value)
