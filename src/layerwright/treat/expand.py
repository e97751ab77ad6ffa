"""Make a model deeper: new blocks that begin as identities, copies, mixtures of their neighbours, or at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from layerwright.core.blocks import Blocks, find_blocks
from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers
from layerwright.treat._depth import Arranged
from layerwright.treat.arrange import BlockMap, apply_order, arranged_stacks

__all__ = ["expand_blocks", "expansion_order", "slerp"]

M = TypeVar("M", bound=nn.Module)
Init = Literal["identity", "copy", "random", "linear", "slerp"]
Layout = Literal["interleave", "stack"]
WRITERS = ("o", "down")
"""Roles of the weights whose outputs a block adds to what it was given."""
_STRAIGHT = 0.9995


def expand_blocks(
    model: M,
    num_new: int | None = None,
    *,
    init: Init = "identity",
    layout: Layout = "interleave",
    where: Sequence[int] | None = None,
    stack: str | None = None,
    sample: Any = None,
    seed: int = 0,
    copy: bool = True,
    blocks: str | Sequence[str] | None = None,
) -> tuple[M, BlockMap]:
    """Put new blocks between those of a stack (Tan et al., 2024, DLO; Wu et al., 2024, LLaMA Pro; Kim et al., 2023).

    ``identity`` is a copy of the block before whose last projections (of attention and of the feed-forward part, with
    their biases) are zero, so that the model computes what it did; gradients reach these projections at once.
    ``linear`` and ``slerp`` are half way between the block before and the one before that (a copy behind the first
    block); ``random`` starts as the model itself does. Everything else follows as in `arrange_blocks`.

    Args:
        model: any model with blocks. New blocks have tensors of their own.
        num_new: how many blocks; for ``interleave`` a divisor of the depth. Not with `where`.
        init: how they begin.
        layout: ``interleave`` puts one behind every ``depth / num_new`` blocks; ``stack`` runs the middle `num_new`
            blocks twice in a row (SOLAR).
        where: indices of the blocks to put a new one behind, instead of a layout; an index given twice gets two.
        stack: path or role of the stack, where the model has several.
        sample: a batch with which ``identity`` is checked; None makes one for models that read token ids.
        seed: of ``random``.
        copy: leave `model` alone. False changes it.
        blocks: as `override` of `layerwright.core.blocks.find_blocks`.

    Returns:
        The deeper model, and its map: `BlockMap.copies` lists the new blocks.

    Raises:
        InputError: `num_new` below 1 or no divisor; an unknown init, layout or stack; blocks that cannot be copied; no
            identity, because the block normalizes behind its sum (post-norm).
        TypeError: no projections that could be zero were found in a block.
    """
    for name, value, known in (("init", init, get_args(Init)), ("layout", layout, get_args(Layout))):
        if value not in known:
            raise unknown_name(name, str(value), known)
    stacks = find_blocks(model, blocks)
    chosen = _stack(stacks, stack)
    order = expansion_order(len(chosen), num_new, layout=layout, where=where)
    if init == "identity" and not copy:  # a trial, so that a model that cannot be expanded is left as it was
        trial, tried = apply_order(model, stacks, [Arranged(chosen, order)])
        _silence_(trial, tuple(tried.copies))
        _check_identity(trial, tuple(tried.copies), sample)
    result, block_map = apply_order(model, stacks, [Arranged(chosen, order)], copy=copy)
    if init == "copy":
        return result, block_map
    if init == "identity":
        _silence_(result, tuple(block_map.copies))
        if copy:
            _check_identity(result, tuple(block_map.copies), sample)
        return result, block_map
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for new, old in block_map.copies.items():
            module = result.get_submodule(new)
            if init == "random":
                _start_anew_(result, module)
                continue
            index = chosen.names.index(old)
            if index:
                before = result.get_submodule(str(block_map.new_path(chosen.names[index - 1])))
                _mix_(module, before, slerp if init == "slerp" else torch.lerp)
    return result, block_map


def expansion_order(
    depth: int, num_new: int | None = None, *, layout: Layout = "interleave", where: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Old index of each block of the deeper stack.

    Raises:
        InputError: as `expand_blocks`.
    """
    if where is not None:
        if num_new is not None and num_new != len(where):
            raise InputError(f"num_new: got {num_new} and {len(where)} places in where; give one of the two")
        if not where or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < depth for i in where):
            raise InputError(f"where: got {list(where)}, expected block indices from 0 to {depth - 1}")
        return tuple(index for index in range(depth) for _ in range(1 + list(where).count(index)))
    if isinstance(num_new, bool) or not isinstance(num_new, int) or num_new < 1:
        raise InputError(f"num_new: got {num_new!r}, expected a number of new blocks of at least 1")
    if layout == "stack":
        if num_new > depth:
            raise InputError(f"num_new: got {num_new}, the {depth} blocks can be run twice at most")
        first = (depth - num_new) // 2
        return (*range(first + num_new), *range(first, depth))
    if depth % num_new:
        nearest = [n for n in range(1, depth + 1) if depth % n == 0]
        raise InputError(f"num_new: got {num_new}, which does not divide the {depth} blocks; choose one of {nearest}")
    step = depth // num_new
    return tuple(index for index in range(depth) for _ in range(2 if index % step == step - 1 else 1))


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation from `a` to `b` (Shoemake, 1985), seen as vectors; linear where they are nearly parallel."""
    x, y = a.double().flatten(), b.double().flatten()
    lengths = x.norm() * y.norm()
    cosine = float(x @ y / lengths) if lengths > 0 else 1.0
    if abs(cosine) > _STRAIGHT:
        return torch.lerp(a, b, weight)
    angle = math.acos(cosine)
    mixed = (math.sin((1 - weight) * angle) * x + math.sin(weight * angle) * y) / math.sin(angle)
    return mixed.reshape(a.shape).to(a.dtype)


def _stack(stacks: Sequence[Blocks], name: str | None) -> Blocks:
    if name is None and len(stacks) == 1:
        return stacks[0]
    if name is None:
        known = ", ".join(stack.path or "the model" for stack in stacks)
        raise InputError(f"stack: this model has {len(stacks)} stacks ({known}); say which")
    return arranged_stacks(stacks, {name: [0]}, "stack")[0].stack


@torch.no_grad()
def _silence_(model: nn.Module, new: Sequence[str]) -> None:
    """Set the last projections of the blocks at `new` to zero."""
    refs = list_layers(model)
    for path in new:
        writers = [ref for ref in refs if ref.path.startswith(path + ".") and ref.role in WRITERS]
        if not writers:
            raise TypeError(f"model: found no output projection in {path}; use init='copy' or 'random'")
        for ref in writers:
            for tensor in _tensors_of(model, ref):
                tensor.zero_()


def _tensors_of(model: nn.Module, ref: LayerRef) -> Iterator[Tensor]:
    """The weight of `ref` and its bias."""
    owner, _, name = ref.parameter.rpartition(".")
    module = model.get_submodule(owner)
    for attribute in (name, "bias" if name == "weight" else f"{name}_bias"):
        value = getattr(module, attribute, None)
        if isinstance(value, Tensor):
            yield value


def _check_identity(model: nn.Module, new: Sequence[str], sample: Any) -> None:
    """Run the model once and compare what goes into the new blocks with what comes out."""
    if any(p.is_meta for p in model.parameters()):
        return
    batch = _own_sample(model) if sample is None else sample
    data = as_calibration([batch])
    with _distances(model, new) as found, torch.no_grad(), evaluating(model):
        try:
            data.forward(model, batch)
        except Exception as error:
            if sample is not None:
                raise
            raise InputError(
                f"sample: {type(model).__name__} cannot be run on token ids alone ({error}); pass a batch, with which "
                "init='identity' is checked"
            ) from error
    worst = max(found, key=lambda path: found[path])
    if not found[worst] <= 1e-5:
        raise InputError(
            f"init: {worst} is no identity with its last projections at zero (off by {found[worst]:.2g} of its input): "
            f"{type(model).__name__} normalizes behind its sums (post-norm); use init='copy', 'linear' or 'slerp'"
        )


def _own_sample(model: nn.Module) -> Any:
    if getattr(model, "main_input_name", "") != "input_ids":
        raise InputError(
            f"sample: {type(model).__name__} does not read token ids; pass a batch, with which init='identity' is checked"
        )
    return dict(model.dummy_inputs)  # type: ignore[arg-type]


@contextmanager
def _distances(model: nn.Module, paths: Sequence[str]) -> Iterator[Mapping[str, float]]:
    """While it is on: how far each block's output is from its input, relative to the input's largest value."""
    found: dict[str, float] = {}

    def see(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = first_tensor([*args, *kwargs.values()]), first_tensor(output)
            found[path] = float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(see(path), with_kwargs=True) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _mix_(module: nn.Module, before: nn.Module, mix: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Put every parameter half way between its own value and that of the block before, where they agree in shape."""
    others = dict(before.named_parameters())
    for name, parameter in module.named_parameters():
        other = others.get(name)
        if other is not None and other.shape == parameter.shape and parameter.is_floating_point():
            parameter.copy_(mix(parameter.detach(), other.detach(), 0.5))


def _start_anew_(model: nn.Module, block: nn.Module) -> None:
    """Draw the weights of a block as the model does for a new one, or as torch's layers do."""
    for tensor in (*block.parameters(), *block.buffers()):
        if hasattr(tensor, "_is_hf_initialized"):
            del tensor._is_hf_initialized
    own = getattr(model, "_init_weights", None)
    for module in block.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(own):
            own(module)
        elif callable(reset):
            reset()
