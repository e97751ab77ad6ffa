"""A decoder that can stop early: a head of its own after some of its blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError

__all__ = ["ExitModel", "ExitNorm"]

ExitNorm = Literal["shared", "none"]


class _Stopped(Exception):  # noqa: N818 - a signal, not an error
    """The pass has reached the last block that is wanted."""


class ExitModel(nn.Module):
    """A causal language model with exits after some of its blocks (Yu et al., 2024, EDGE-LLM).

    The model's own code does everything: to stop at exit `t`, its forward pass is left right after block `t`; for the
    logits, its blocks hand on that result unchanged and its own final norm (and scaling of logits) follows, with the
    exit's head in the place of the model's. So the exit after the last block gives the model's own logits.

    Args:
        model: a causal language model; kept as `model`.
        blocks: paths of its blocks in order.
        positions: exits, as numbers of blocks that ran, ascending, from 1.
        head: path of the output layer; each exit gets a copy with a weight of its own.
        norm: ``shared`` passes early exits through the model's final norm; ``none`` leaves it out, save at the last
            block.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], positions: Sequence[int], head: str, norm: ExitNorm = "shared"
    ) -> None:
        super().__init__()
        self.model = model
        self.block_paths, self.positions, self.head_path, self.norm = tuple(blocks), tuple(positions), head, norm
        source = model.get_submodule(head)
        self.heads = nn.ModuleDict({str(position): _cloned(source) for position in positions})

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.block_paths)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks, in order."""
        return tuple(self.model.get_submodule(path) for path in self.block_paths)

    def head(self, exit: int) -> nn.Module:
        """The head of the exit after block number `exit`.

        Raises:
            InputError: there is no such exit.
        """
        return self.heads[str(self.check(exit))]

    def check(self, exit: int | None) -> int:
        """`exit`, or the last one for None.

        Raises:
            InputError: there is no such exit.
        """
        if exit is None:
            return self.positions[-1]
        if exit not in self.positions:
            raise InputError(
                f"exit: got {exit!r}, the model has {self.depth} blocks and exits after {', '.join(map(str, self.positions))}"
            )
        return exit

    def forward(
        self, ids: Tensor, exit: int | None = None, *, window: int | None = None, cache: Any = None, **inputs: Any
    ) -> Tensor:
        """Logits ``(batch, tokens, vocabulary)`` of one exit; the blocks above it do not run.

        Args:
            ids: ``(batch, tokens)``.
            exit: number of blocks that run; None for the last exit.
            window: only the last so many of these blocks record what a backward pass needs.
            cache: keys and values of earlier tokens, extended in place.
            inputs: more of the model's own, such as ``attention_mask``.

        Raises:
            InputError: no such exit, or a window above it.
        """
        place = self.check(exit)
        if window is not None and not 1 <= window <= place:
            raise InputError(f"window: got {window}, expected 1 to the exit's {place} blocks")
        states = self.hidden_states(ids, (place,), window=window, cache=cache, **inputs)
        return self.logits(ids, states[place], place, **inputs)

    def all_exits(self, ids: Tensor, *, cache: Any = None, **inputs: Any) -> Tensor:
        """Logits of every exit ``(exits, batch, tokens, vocabulary)`` from one run of the blocks."""
        states = self.hidden_states(ids, self.positions, cache=cache, **inputs)
        return torch.stack([self.logits(ids, states[place], place, **inputs) for place in self.positions])

    def hidden_states(
        self, ids: Tensor, places: Sequence[int], *, window: int | None = None, cache: Any = None, **inputs: Any
    ) -> dict[int, Any]:
        """What the blocks number `places` return; nothing above the last of them runs."""
        blocks, found = self.blocks, {}
        last = max(places)

        def see(place: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                if place in places:
                    found[place] = output
                if place == last:
                    raise _Stopped

            return hook

        gradients = torch.is_grad_enabled()
        handles = [blocks[place - 1].register_forward_hook(see(place)) for place in places]
        if window is not None and gradients:
            opens = blocks[last - window]
            handles.append(opens.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(True) and None))
        try:
            with torch.set_grad_enabled(gradients and window is None):
                self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **inputs)
        except _Stopped:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found

    def logits(self, ids: Tensor, state: Any, exit: int, **inputs: Any) -> Tensor:
        """Logits of the exit `exit` for what its block returned; no block runs."""
        if self.norm == "none" and exit != self.depth:
            result: Tensor = self.head(exit)(first_tensor(state))
            return result
        with _handing_on(self.blocks, state), _replaced(self.model, self.head_path, self.head(exit)):
            output = self.model(input_ids=ids, use_cache=False, **inputs)
        logits: Tensor = output.logits if hasattr(output, "logits") else first_tensor(output)
        return logits

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        tokens: int = 16,
        *,
        exit: int | None = None,
        combine: Callable[[Tensor], Tensor] | None = None,
        cached: bool = True,
    ) -> Tensor:
        """`ids` ``(batch, tokens)`` continued greedily by `tokens` tokens.

        Args:
            ids: without padding.
            tokens: to add, 0 or more.
            exit: one exit, below which alone blocks run and keep keys and values; None for the last one.
            combine: instead of one exit, all of them: maps ``(exits, batch, vocabulary)`` logits to scores
                ``(batch, vocabulary)`` whose largest is taken.
            cached: keep keys and values; False runs all tokens again each time.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config) if cached else None
        step = ids
        for _ in range(tokens):
            if combine is None:
                scores = self(step, exit, cache=cache)[:, -1]
            else:
                scores = combine(self.all_exits(step, cache=cache)[:, :, -1])
            token = scores.argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            step = token if cached else ids
        return ids

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"exits after {', '.join(map(str, self.positions))} of {self.depth} blocks, norm={self.norm!r}"


def _cloned(head: nn.Module) -> nn.Module:
    """A copy whose parameters are its own, so that a tied output layer leaves the embedding alone."""
    new = copy.deepcopy(head)
    for name, parameter in list(new.named_parameters(recurse=False)):
        new.register_parameter(name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    return new


@contextmanager
def _handing_on(blocks: Sequence[nn.Module], state: Any) -> Iterator[None]:
    """Context: every block returns `state`, whatever it is given."""
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda *_args, **_kwargs: state
    try:
        yield
    finally:
        for block, old in zip(blocks, before, strict=True):
            del block.forward
            if old is not None:
                block.forward = old


@contextmanager
def _replaced(model: nn.Module, path: str, module: nn.Module) -> Iterator[None]:
    """Context: `module` stands at `path`."""
    owner, _, name = path.rpartition(".")
    parent = model.get_submodule(owner)
    old = parent._modules[name]
    parent._modules[name] = module
    try:
        yield
    finally:
        parent._modules[name] = old
