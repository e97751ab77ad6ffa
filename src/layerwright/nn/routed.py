"""Blocks whose feed-forward part, or the whole of them, runs for some tokens only (Tan et al., 2024, DLO)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerwright.core.capture import first_tensor
from layerwright.core.class_swap import restore_class_, swap_class_
from layerwright.core.errors import InputError, unknown_name
from layerwright.nn._packed_tokens import pack_arguments, packed_places
from layerwright.nn.attached import Attachment
from layerwright.nn.gates import TokenRouter, top_tokens
from layerwright.nn.tokens import run_on_tokens

__all__ = ["RoutedCall", "RoutedTokens", "TokenRouting", "Variant"]

Variant = Literal["mlp", "block"]


@dataclass
class RoutedTokens:
    """What all routers of a model know about the present call.

    Attributes:
        attention_mask: ``(batch, tokens)`` as the model was given it, None if it was not.
        learning: the most promising tokens run, and similarities are recorded, also in evaluation mode.
        similarity: whether similarities are recorded at all.
        hook: keeps `attention_mask` up to date.
        caching: configurations whose ``use_cache`` was changed, and what it was.
    """

    attention_mask: Tensor | None = None
    learning: bool = False
    similarity: bool = True
    hook: RemovableHandle | None = None
    caching: list[tuple[Any, bool]] = field(default_factory=list)

    def see(self, _model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Hook before the model's forward."""
        given = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        plain = isinstance(given, Tensor) and given.dim() == 2
        self.attention_mask = given.bool() if plain and isinstance(given, Tensor) else None

    def real(self, scores: Tensor) -> Tensor:
        """Which of the tokens ``(batch, tokens)`` of a call are no padding."""
        mask = self.attention_mask
        if mask is None or mask.shape[0] != scores.shape[0] or mask.shape[1] < scores.shape[1]:
            return torch.ones_like(scores, dtype=torch.bool)
        return mask[:, mask.shape[1] - scores.shape[1] :].to(scores.device)


@dataclass(frozen=True)
class RoutedCall:
    """What a router decided in the last call.

    Attributes:
        scores: ``(batch, tokens)``, with gradients where it was learning.
        mask: tokens that ran.
        real: tokens that are no padding.
        similarity: cosine of the hidden states without and with the part, ``(batch, tokens)``; None unless learning.
        learning: whether the most promising tokens ran, instead of those above one half.
    """

    scores: Tensor
    mask: Tensor
    real: Tensor
    similarity: Tensor | None
    learning: bool


@dataclass
class _Call:
    """How the feed-forward part is to run while its block does."""

    mask: Tensor | None = None
    weight: Tensor | None = None
    dense: bool = False
    added: Tensor | None = field(default=None)
    whole: Tensor | None = field(default=None)


class TokenRouting(Attachment):
    """Lets a block's feed-forward part (``mlp``), or the block, run for the tokens that a router chooses.

    ``y = a + m s(r) MLP(LN a)`` with ``r = sigmoid(w . h)`` of the block's input, ``m`` in {0, 1} and
    ``s(r) = scale / 2 + (r - 1/2) gap``. While learning, the `capacity` largest of ``r`` in the batch run; otherwise
    those above one half, a choice that no other token has a part in. Chosen tokens are gathered, so that the others
    cost nothing but their router. Memory: the chosen tokens, and while learning those of all, without gradients.

    Args:
        dim: features of a token.
        part: path of the feed-forward part in the block.
        variant: ``mlp``: attention runs for all. ``block``: tokens that are not chosen pass the block by, the others
            attend to each other at the positions that they had; no cache.
        scale, gap: of the factor ``s(r)``.
        capacity: share of tokens that run while learning; above 1 means all.

    Raises:
        InputError: an unknown variant, or a negative gap.
    """

    child = "token_routing"

    def __init__(
        self,
        dim: int,
        part: str,
        variant: Variant = "mlp",
        scale: float = 2.0,
        gap: float = 0.05,
        capacity: float = 1.0,
    ) -> None:
        super().__init__()
        if variant not in get_args(Variant):
            raise unknown_name("variant", variant, get_args(Variant))
        if not gap >= 0:
            raise InputError(f"gap: got {gap}, expected 0 or more")
        self.router = TokenRouter(dim)
        self.part, self.variant, self.scale, self.gap, self.capacity = part, variant, scale, gap, capacity
        self.tokens = RoutedTokens()
        self.last: RoutedCall | None = None
        self.call: _Call | None = None
        self.counts: Tensor | None = None

    def attach_(self, owner: nn.Module) -> Self:
        """Change the classes of the block `owner` and of its feed-forward part, in place."""
        super().attach_(owner)
        part = owner.get_submodule(self.part)
        swap_class_(part, _RoutedPart)
        part.__dict__["_routing"] = self  # no submodule: the part only refers to it
        swap_class_(owner, _RoutedBlock)
        return self

    def release_(self, owner: nn.Module) -> None:
        """Undo the change of classes, in place."""
        part = owner.get_submodule(self.part)
        restore_class_(part)
        part.__dict__.pop("_routing", None)
        restore_class_(owner)

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        names = ("part", "variant", "scale", "gap", "capacity")
        return {"type": "token_routing", "dim": self.router.dim} | {name: getattr(self, name) for name in names}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """An attachment of that form."""
        return cls(**{name: value for name, value in spec.items() if name != "type"})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None, "call": None}  # what a call left behind is not copied

    def factor(self, scores: Tensor) -> Tensor:
        """``s(r)`` of scores."""
        return 0.5 * self.scale + (scores - 0.5) * self.gap

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output; `forward` is its own."""
        hidden = first_tensor([*args, *kwargs.values()])
        scores = self.router(hidden)
        learning = self.tokens.learning or self.training
        real = self.tokens.real(scores)
        with torch.no_grad():
            mask = top_tokens(scores.detach(), self.capacity, real) if learning else scores > 0.5
        run = self._run_part if self.variant == "mlp" else self._run_block
        try:
            output, similarity = run(forward, hidden, scores, mask, learning and self.tokens.similarity, args, kwargs)
        finally:
            self.call = None
        self.last = RoutedCall(scores if learning else scores.detach(), mask, real, similarity, learning)
        counts = torch.stack([(mask & real).sum(), real.sum()])
        self.counts = counts if self.counts is None else self.counts.to(counts.device) + counts
        return output

    def _run_part(
        self,
        forward: Callable[..., Any],
        hidden: Tensor,
        scores: Tensor,
        mask: Tensor,
        learning: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Tensor | None]:
        self.call = call = _Call(mask, self.factor(scores).to(hidden.dtype), dense=learning)
        output = forward(*args, **kwargs)
        if not learning or call.added is None or call.whole is None:
            return output, None
        with torch.no_grad():
            before = first_tensor(output) - call.added
            return output, F.cosine_similarity(before.float(), (before + call.whole).float(), dim=-1)

    def _run_block(
        self,
        forward: Callable[..., Any],
        hidden: Tensor,
        scores: Tensor,
        mask: Tensor,
        learning: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Tensor | None]:
        similarity = None
        if learning:
            with torch.no_grad():
                dense = first_tensor(forward(*args, **kwargs))
                similarity = F.cosine_similarity(hidden.float(), dense.float(), dim=-1)
        places, valid = packed_places(mask)
        packed = pack_arguments(forward, args, kwargs, places, valid)  # refuses caches, also where nothing runs
        if not places.shape[1]:
            return hidden, similarity
        self.call = _Call(weight=self.factor(scores).gather(1, places).to(hidden.dtype))
        rows = first_tensor(forward(**packed))[valid]
        width = hidden.shape[-1]
        chosen = mask.reshape(-1).nonzero().squeeze(1)
        result = hidden.reshape(-1, width).index_copy(0, chosen, rows.to(hidden.dtype))
        return result.reshape(hidden.shape), similarity

    def branch(self, forward: Callable[..., Any], x: Tensor) -> Tensor:
        """What the feed-forward part adds; `forward` is its own."""
        call = self.call
        if call is None:
            return first_tensor(forward(x))
        if call.mask is None:
            assert call.weight is not None
            return first_tensor(forward(x)) * call.weight[..., None]

        def rows(tokens: Tensor) -> Tensor:
            return first_tensor(forward(tokens[None]))[0]

        chosen = run_on_tokens(rows, x, call.mask)
        assert call.weight is not None
        added = chosen * call.weight[..., None]
        if call.dense:
            with torch.no_grad():
                call.whole = chosen.detach() + run_on_tokens(rows, x, ~call.mask)
                call.added = added.detach().clone()  # a block may add to it in place
        return added

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.part} by token, variant={self.variant!r}, scale={self.scale}, gap={self.gap}"


class _RoutedBlock(nn.Module):
    """Goes in front of a block's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routing = self._modules.get(TokenRouting.child)
        if not isinstance(routing, TokenRouting):  # taken out of a copy: the plain block
            return super().forward(*args, **kwargs)
        return routing.run(super().forward, args, kwargs)


class _RoutedPart(nn.Module):
    """Goes in front of the class of a block's feed-forward part."""

    _routing: TokenRouting

    def forward(self, x: Tensor) -> Tensor:
        return self._routing.branch(super().forward, x)
