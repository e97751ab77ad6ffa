"""Modules that stand beside a layer and change what it reads: the layer, its weights and its name stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from layerwright.core.errors import InputError

__all__ = ["Attachment", "attached", "detach_"]


class Attachment(nn.Module):
    """A child module that its owner's calls pass through.

    A subclass sets `child` (its name in the owner), says what happens `before` (and, if it likes, `after`) the owner's
    forward, and how it is written down: `spec`, `empty`. Its tensors travel in the owner's state dict under
    ``<owner>.<child>.*``; copies of the model keep it working.
    """

    child: str = ""

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[RemovableHandle] = []

    def attach_(self, owner: nn.Module) -> Self:
        """Make this the child of `owner`, in place; one that has the same name is taken out first."""
        detach_(owner, self.child)
        owner.add_module(self.child, self)
        self._handles = [
            owner.register_forward_pre_hook(self.before, with_kwargs=True),
            owner.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        return self

    def before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called with the owner's arguments; returns ``(args, kwargs)`` to use instead, or None."""

    def after(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Called with the owner's output, also when its forward failed; returns what replaces it, or None."""

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        raise TypeError(f"{type(self).__name__} does not say how it is written down")

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """A module of that form with uninitialised tensors."""
        raise TypeError(f"{cls.__name__} does not say how it is read, got {dict(spec)}")

    def forward(self, *_: Any, **__: Any) -> Any:
        """An attachment works through its owner.

        Raises:
            InputError: always, unless a subclass computes something.
        """
        raise InputError(f"{type(self).__name__} is not called itself: call the layer it stands beside")


def attached(owner: nn.Module, name: str) -> Attachment | None:
    """The attachment called `name` of `owner`, None if it has none."""
    child = owner._modules.get(name)
    return child if isinstance(child, Attachment) else None


def detach_(owner: nn.Module, name: str) -> None:
    """Take the attachment called `name` out of `owner`, in place; nothing happens if there is none."""
    child = attached(owner, name)
    if child is not None:
        for handle in child._handles:
            handle.remove()
        del owner._modules[name]
