"""Let tokens skip the feed-forward parts of blocks, or whole blocks, where a router says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.capture import first_tensor
from layerwright.core.class_swap import swapped
from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers, structure_copy
from layerwright.nn.attached import attached, detach_
from layerwright.nn.routed import RoutedCall, RoutedTokens, TokenRouting, Variant
from layerwright.treat._chosen_blocks import chosen_blocks

__all__ = ["DLOHandle", "find_routing", "route_tokens", "routed_blocks"]


class DLOHandle:
    """The routers of a model: what they decided, how many tokens they may run, and how to take them out.

    Args:
        model: with routers in it.
        blocks: paths of the blocks that have one.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self.model, self.blocks = model, tuple(blocks)
        tokens = self.routings[0].tokens
        if tokens.hook is None:  # not linked yet
            tokens = RoutedTokens()
            tokens.hook = model.register_forward_pre_hook(tokens.see, with_kwargs=True)
            for routing in self.routings:
                routing.tokens = tokens
        self.tokens = tokens

    @property
    def routings(self) -> tuple[TokenRouting, ...]:
        """The routers with what belongs to them, in order."""
        found = (attached(self.model.get_submodule(path), TokenRouting.child) for path in self.blocks)
        return tuple(routing for routing in found if isinstance(routing, TokenRouting))

    @property
    def last(self) -> tuple[RoutedCall, ...] | None:
        """What each router decided in the last call of the model, None before the first."""
        calls = [routing.last for routing in self.routings]
        known = tuple(call for call in calls if call is not None)
        return known if len(known) == len(calls) else None

    @property
    def last_scores(self) -> Tensor | None:
        """``(routers, batch, tokens)`` of the last call."""
        return None if self.last is None else torch.stack([call.scores for call in self.last])

    @property
    def last_mask(self) -> Tensor | None:
        """Which tokens ran, ``(routers, batch, tokens)``."""
        return None if self.last is None else torch.stack([call.mask for call in self.last])

    @property
    def last_similarity(self) -> Tensor | None:
        """Cosine of the hidden states without and with the part, ``(routers, batch, tokens)``; None unless learning."""
        found = [call.similarity for call in self.last or ()]
        known = [value for value in found if value is not None]
        return torch.stack(known) if known and len(known) == len(found) else None

    @property
    def capacity(self) -> Tensor:
        """Share of tokens that run in each block while learning ``(routers,)``, float64; above 1 counts as 1."""
        return torch.tensor([routing.capacity for routing in self.routings], dtype=torch.float64)

    @capacity.setter
    def capacity(self, shares: Tensor | Sequence[float]) -> None:
        values = [float(value) for value in shares]
        if len(values) != len(self.blocks) or any(not value >= 0 for value in values):
            raise InputError(f"capacity: got {values}, expected {len(self.blocks)} shares of 0 or more")
        for routing, value in zip(self.routings, values, strict=True):
            routing.capacity = value

    @contextmanager
    def learning(self, similarity: bool = True) -> Iterator[nn.Module]:
        """Context: the most promising tokens run, and similarities are recorded, also in evaluation mode."""
        before = self.tokens.learning, self.tokens.similarity
        self.tokens.learning, self.tokens.similarity = True, similarity
        try:
            yield self.model
        finally:
            self.tokens.learning, self.tokens.similarity = before

    def executed_fraction(self) -> float:
        """Share of the tokens (padding left out) that ran, over blocks and calls since `reset`; NaN before any call."""
        return float(self.executed_fractions().mean())

    def executed_fractions(self) -> Tensor:
        """The same for each router, ``(routers,)``, float64."""
        none = torch.zeros(2)
        counts = torch.stack([none if r.counts is None else r.counts.cpu() for r in self.routings]).double()
        return counts[:, 0] / counts[:, 1]

    def reset(self) -> None:
        """Count from zero."""
        for routing in self.routings:
            routing.counts = None

    def remove(self) -> nn.Module:
        """Take the routers out, in place: every token runs everything, and factors are 1. Returns the model."""
        if self.tokens.hook is not None:
            self.tokens.hook.remove()
        for path, routing in zip(self.blocks, self.routings, strict=True):
            owner = self.model.get_submodule(path)
            routing.release_(owner)
            detach_(owner, TokenRouting.child)
        for config, use_cache in self.tokens.caching:
            config.use_cache = use_cache
        return self.model


def route_tokens(
    model: nn.Module,
    blocks: Sequence[str] | Sequence[int] | None = None,
    *,
    variant: Variant = "mlp",
    scale: float = 2.0,
    gap: float = 0.05,
    sample: Any = None,
    copy: bool = True,
) -> DLOHandle:
    """Give blocks a router, by which tokens run their feed-forward part or skip it (Tan et al., 2024, DLO, arXiv 2407.11030).

    See `TokenRouting` for the mathematics. In training mode, or within ``handle.learning()``, the share
    ``handle.capacity`` of the batch's tokens runs; otherwise the tokens whose score is above one half. An untrained
    router's score is one half: until it is trained, the routed parts are skipped by all tokens.

    Args:
        model: a model with blocks of which each has one module as its feed-forward part, whose output it adds last.
        blocks: paths or indices of the blocks; None for all.
        variant: ``mlp``, or ``block`` for decoders: the whole block is skipped, and there is no cache (``use_cache`` of
            the result's configuration is set so).
        scale, gap: the part's output is multiplied by ``scale / 2 + (r - 1/2) gap``.
        sample: a batch with which the blocks are checked; None takes the model's own dummy inputs.
        copy: leave `model` alone; the result shares its tensors. False changes it.

    Returns:
        The handle; its ``model`` is what is called.

    Raises:
        TypeError: no blocks, or a block without a feed-forward part of its own that is added last.
        InputError: an unknown variant or block, a negative gap, a model with routers.
    """
    chosen = chosen_blocks(model, blocks)
    refs = list_layers(model)
    made = [_routing(refs, path, variant, scale, gap, model) for path in chosen]
    for path, routing in zip(chosen, made, strict=True):
        block = model.get_submodule(path)
        if swapped(block) or swapped(block.get_submodule(routing.part)):
            raise InputError(f"{path} is changed already; a block takes one router")
    if variant == "block" and any(
        stack.role != "decoder" for stack in find_blocks(model) if set(stack.names) & set(chosen)
    ):
        raise InputError("variant: 'block' is for decoders, whose tokens see earlier ones only; use 'mlp'")
    parts = {path: routing.part for path, routing in zip(chosen, made, strict=True)}
    _check_parts(model, parts, sample, plain=variant == "block")
    result = structure_copy(model) if copy else model
    for path, routing in zip(chosen, made, strict=True):
        owner = result.get_submodule(path)
        like = next(parameter for parameter in owner.parameters() if parameter.is_floating_point())
        routing.to(device=like.device, dtype=like.dtype).attach_(owner).train(owner.training)
    handle = DLOHandle(result, chosen)
    if variant == "block":
        handle.tokens.caching = [(config, config.use_cache) for config in _configs(result)]
        for config, _ in handle.tokens.caching:
            config.use_cache = False
    return handle


def find_routing(model: nn.Module) -> DLOHandle | None:
    """The handle of a model that has routers (a loaded or copied one), None if it has none."""
    paths = [name for name, module in model.named_modules() if isinstance(module, TokenRouting)]
    return DLOHandle(model, [path.rpartition(".")[0] for path in paths]) if paths else None


def routed_blocks(
    names: Sequence[str], new: Sequence[str] = (), *, every: int = 1, spare: int = 0, route_new: bool = True
) -> tuple[str, ...]:
    """Which blocks get a router: every `every`-th of the old ones without the first and last `spare`, and the new ones.

    Args:
        names: all blocks, in order.
        new: those that were added (`BlockMap.copies`).
        every: 1 for all old blocks, 0 for none.
        spare: old blocks at each end that stay dense; the count of `every` begins at the first block all the same.
        route_new: whether new blocks get one.

    Raises:
        InputError: a negative number, or no block is left.
    """
    if every < 0 or spare < 0:
        raise InputError(f"every, spare: got {every} and {spare}, expected 0 or more")
    added = set(new)
    old = [name for name in names if name not in added]
    inner = old[spare : len(old) - spare]
    taken = {name for i, name in enumerate(old) if every and (i + 1) % every == 0 and name in inner}
    chosen = tuple(name for name in names if name in taken or (route_new and name in added))
    if not chosen:
        raise InputError("blocks: every, spare and route_new leave no block to route")
    return chosen


def _routing(
    refs: Sequence[LayerRef], path: str, variant: Variant, scale: float, gap: float, model: nn.Module
) -> TokenRouting:
    """A router for the block at `path`, not attached yet."""
    inside = [ref for ref in refs if ref.path.startswith(path + ".")]
    parts = [ref.path for ref in inside if ref.kind == "mlp"]
    outer = [part for part in parts if not any(part.startswith(other + ".") for other in parts)]
    if len(outer) != 1:
        raise TypeError(
            f"model: {path} ({type(model.get_submodule(path)).__name__}) has {len(outer)} modules that are its "
            "feed-forward part, expected one"
        )
    width = next((ref.shape[0] for ref in inside if ref.role in ("down", "o")), None)
    if width is None:
        raise TypeError(f"model: found no projection back to the hidden states in {path}")
    return TokenRouting(width, outer[0][len(path) + 1 :], variant, scale, gap)


def _check_parts(model: nn.Module, parts: dict[str, str], sample: Any, plain: bool) -> None:
    """Whether each block adds what its feed-forward part gives, and does nothing with it besides."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    if sample is None:
        if getattr(model, "main_input_name", "") != "input_ids":
            raise InputError(f"sample: {type(model).__name__} does not read token ids; pass a batch to check it with")
        sample = dict(model.dummy_inputs)  # type: ignore[arg-type]
    handles = [
        model.get_submodule(path).register_forward_hook(_checks(path, part, plain), with_kwargs=True)
        for path, part in parts.items()
    ]
    try:
        with torch.no_grad(), evaluating(model):
            as_calibration([sample]).forward(model, sample)
    finally:
        for handle in handles:
            handle.remove()


def _checks(path: str, part: str, plain: bool) -> Callable[..., None]:
    def hook(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        module = block.get_submodule(part)
        gone = f"model: what {part} gives is not what {path} ({type(block).__name__}) adds to its hidden states"
        with _silent(module) as seen:
            without = block.forward(*args, **kwargs)
        if len(seen) != 1:
            raise TypeError(gone)
        if plain and not isinstance(output, Tensor):
            raise TypeError(f"model: {type(block).__name__} returns more than hidden states; use variant='mlp'")
        output, without = first_tensor(output), first_tensor(without)
        scale = float(output.abs().max()) + float(seen[0].abs().max())
        rounding = torch.finfo(output.dtype).eps * 16 * scale
        if seen[0].shape != output.shape or float((output - without - seen[0]).abs().max()) > rounding:
            raise TypeError(gone)

    return hook


@contextmanager
def _silent(module: nn.Module) -> Iterator[list[Tensor]]:
    """Context: `module` returns zeros; yields what it would have returned."""
    seen: list[Tensor] = []
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        result = own(x)
        if not isinstance(result, Tensor):
            raise TypeError(f"model: {type(module).__name__} returns a {type(result).__name__}, expected a tensor")
        seen.append(result.clone())  # a block may add to it in place
        return torch.zeros_like(result)

    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield seen
    except TypeError as error:
        raise TypeError(f"model: {type(module).__name__} is no function of one tensor alone ({error})") from error
    finally:
        del module.forward
        if before is not None:
            module.__dict__["forward"] = before


def _configs(model: nn.Module) -> list[Any]:
    found = (getattr(model, name, None) for name in ("config", "generation_config"))
    return [config for config in found if getattr(config, "use_cache", None) is not None]
