"""Blocks that run twice, with a gate for each token between the two results (Lee et al., 2024, TroL)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from layerwright.core.capture import first_tensor
from layerwright.core.class_swap import restore_class_, swap_class_
from layerwright.core.errors import InputError, unknown_name
from layerwright.nn._packed_tokens import CACHES, named_arguments
from layerwright.nn.attached import Attachment
from layerwright.nn.gates import TokenMixer

__all__ = ["Chunked", "Traversal", "TraversedTokens"]

Chunked = Literal["first-pass-only"]
_MASK = "attention_mask"


@dataclass
class TraversedTokens:
    """What all blocks of a traversed model share.

    Attributes:
        mask: ``(batch, tokens)``, 0 for tokens that keep to the first pass; None for none.
        linked: whether a handle has made it common to all blocks.
    """

    mask: Tensor | None = None
    linked: bool = False


class Traversal(Attachment):
    """Lets a block run twice: ``y1 = L(x)``, ``y2 = L(y1)``, ``(1 - g) y1 + g y2`` with ``g = tanh(w . y1 + b) / 2 + 1/2``.

    Keys and values of the first pass alone enter a cache; the second pass attends to its own. Calls of a single token
    run once, and so do calls that go on from a cache.

    Args:
        mixer: the gate; several blocks may share one.
        prompt_only: False lets a single token without a cache run twice too.
        chunked: several tokens at once after others in the cache are refused, since the result would depend on how the
            prompt is cut; ``first-pass-only`` runs them once.
    """

    child = "traversal"

    def __init__(self, mixer: TokenMixer, prompt_only: bool = True, chunked: Chunked | None = None) -> None:
        super().__init__()
        if chunked is not None and chunked not in get_args(Chunked):
            raise unknown_name("chunked", str(chunked), get_args(Chunked))
        self.mixer, self.prompt_only, self.chunked = mixer, prompt_only, chunked
        self.tokens = TraversedTokens()
        self.last: Tensor | None = None
        self.shared = False

    def attach_(self, owner: nn.Module) -> Self:
        """Change the class of the block `owner`, in place."""
        super().attach_(owner)
        swap_class_(owner, _TraversedBlock)
        return self

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form.

        Raises:
            InputError: the gate belongs to several blocks.
        """
        if self.shared:
            raise InputError("share_gate: a gate that blocks share is not saved; call the handle's unshare() first")
        settings = {"prompt_only": self.prompt_only, "chunked": self.chunked}
        return {"type": "traversal", "dim": self.mixer.dim, **settings}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """An attachment of that form."""
        return cls(TokenMixer(spec["dim"]), spec["prompt_only"], spec["chunked"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}  # what a call left behind is not copied

    def run(self, owner: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the block `owner`; `forward` is its own."""
        self.last = None
        states = args[0] if args else kwargs.get("hidden_states")
        if self.prompt_only and isinstance(states, Tensor) and states.dim() == 3 and states.shape[1] == 1:
            return forward(*args, **kwargs)  # a generated token: nothing else is looked at
        given, _ = named_arguments(forward, args, kwargs, _MASK)
        first = next(name for name, value in given.items() if isinstance(value, Tensor))
        tokens = given[first].shape[1]
        if not self._twice(owner, given, tokens):
            return forward(*args, **kwargs)
        output = forward(*args, **kwargs)
        once = first_tensor(output)
        if once.shape != given[first].shape:
            raise TypeError(
                f"blocks: {type(owner).__name__} makes {tuple(once.shape)} of {tuple(given[first].shape)}; "
                "a block that runs twice must keep the shape"
            )
        again = {**given, first: once}
        again |= {name: None for name in CACHES if name in given}
        if "use_cache" in given:
            again["use_cache"] = False
        if isinstance(given.get(_MASK), Tensor):
            again[_MASK] = given[_MASK][..., :tokens]  # a cache of fixed length has room for more keys
        twice = first_tensor(forward(**again))
        gate = self.mixer(once)
        if self.tokens.mask is not None:
            gate = gate * self._mask(gate)
        self.last = gate
        share = gate.to(once.dtype)[..., None]
        mixed = torch.lerp(once, twice, share)
        return type(output)((mixed, *output[1:])) if isinstance(output, (tuple, list)) else mixed

    def _twice(self, owner: nn.Module, given: Mapping[str, Any], tokens: int) -> bool:
        if tokens == 1 and self.prompt_only:
            return False
        if _cached(owner, given) == 0:
            return True
        if tokens > 1 and self.chunked is None:
            raise InputError(
                "past_key_values: got several tokens after others in the cache; a traversed model reads its prompt at "
                "once (chunked='first-pass-only' runs later parts once)"
            )
        return False

    def _mask(self, gate: Tensor) -> Tensor:
        mask = self.tokens.mask
        assert mask is not None
        if mask.shape != gate.shape:
            raise InputError(f"traverse_mask: got shape {tuple(mask.shape)}, expected {tuple(gate.shape)}")
        return mask.to(gate)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"prompt_only={self.prompt_only}, chunked={self.chunked!r}"


class _TraversedBlock(nn.Module):
    """Goes in front of a block's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        traversal = self._modules.get(Traversal.child)
        if not isinstance(traversal, Traversal):  # taken out of a copy: the plain block
            return super().forward(*args, **kwargs)
        return traversal.run(self, super().forward, args, kwargs)


def release_(owner: nn.Module) -> None:
    """Give a block its class back, in place."""
    restore_class_(owner)


def _cached(owner: nn.Module, given: Mapping[str, Any]) -> int:
    """Tokens that the block's own part of the cache holds."""
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if cache is None:
        return 0
    place = next((m.layer_idx for m in owner.modules() if isinstance(getattr(m, "layer_idx", None), int)), 0)
    return int(cache.get_seq_length(place))
