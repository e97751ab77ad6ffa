"""Give a module another forward by giving it another class: names, hooks, parameters and ``isinstance`` stay."""

from __future__ import annotations

from typing import Any

from torch import nn

from layerwright.core.errors import InputError

__all__ = ["restore_class_", "swap_class_", "swapped"]


def swap_class_(module: nn.Module, mixin: type) -> type:
    """Let `module` be an instance of a new class: `mixin` in front of its own class; ``super().forward`` is the old one.

    The wrapped module keeps its parameter names, its hooks, deep copies, gradient checkpointing and the recording of
    hidden states by class. What the mixin needs beyond its methods is set as attributes of the module by the caller.

    Returns:
        The new class.

    Raises:
        InputError: the module has a class made so already.
    """
    own = type(module)
    if swapped(module):
        raise InputError(f"{own.__name__} was changed already ({mixin.__name__}); restore it first")
    module.__class__ = _class(own, mixin)
    return module.__class__


def restore_class_(module: nn.Module) -> None:
    """Undo `swap_class_`; a module that was not changed stays as it is."""
    if swapped(module):
        module.__class__ = type(module).__mro__[2]


def swapped(module: nn.Module) -> bool:
    """Whether the class of `module` was made by `swap_class_`."""
    return "_swapped_class" in vars(type(module))


_CLASSES: dict[tuple[type, type], type] = {}


def _class(own: type, mixin: type) -> type:
    """One class for each pair, so that modules of one class stay of one class."""
    if (own, mixin) not in _CLASSES:
        space: dict[str, Any] = {"_swapped_class": True, "__module__": own.__module__, "__qualname__": own.__qualname__}
        space["__reduce_ex__"] = _reduce
        _CLASSES[own, mixin] = type(own.__name__, (mixin, own), space)
    return _CLASSES[own, mixin]


def _reduce(self: nn.Module, _protocol: Any) -> Any:
    """How a deep copy builds the class again from its two parts."""
    _, mixin, own = type(self).__mro__[:3]
    return _rebuild, (own, mixin), self.__getstate__()


def _rebuild(own: type, mixin: type) -> Any:
    made: Any = _class(own, mixin)
    return made.__new__(made)
