"""What an attention module is told once some of its heads are gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import nn

from layerwright.nn.attached import Attachment, detach_

__all__ = ["PrunedHeads"]


class PrunedHeads(Attachment):
    """Keeps the sizes of an attention module (number of heads, their total width) with the model, also when it is saved.

    A configuration states one number of heads for all blocks; modules read it when they are built, and some reshape by
    it. It has no tensors and changes no call.

    Args:
        sizes: attributes of the attention module, such as ``num_attention_heads``, by name.
    """

    child = "pruned_heads"

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.sizes = {str(name): int(value) for name, value in sizes.items()}

    def attach_(self, owner: nn.Module) -> Self:
        """Set the sizes of `owner` and stay with it, in place."""
        detach_(owner, self.child)
        owner.add_module(self.child, self)
        for name, value in self.sizes.items():
            setattr(owner, name, value)
        return self

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "pruned_heads", "sizes": dict(self.sizes)}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """An attachment of that form."""
        return cls(spec["sizes"])

    def extra_repr(self) -> str:
        """What `print` shows."""
        return ", ".join(f"{name}={value}" for name, value in self.sizes.items())
