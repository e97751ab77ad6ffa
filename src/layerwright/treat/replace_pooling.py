"""Convolutions with a stride in the place of max pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.capture import watch_outputs
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import structure_copy

__all__ = ["replace_pooling"]

Kind = Literal["conv", "stride"]


@dataclass
class _Pool:
    """A pool as it ran: what came in, what went out, and the convolution that ran last before it."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    before: str | None


def replace_pooling(
    model: nn.Module,
    data: Any,
    names: Sequence[str] | None = None,
    kind: Kind = "conv",
    init: Literal["box", "kaiming"] = "box",
    *,
    activation: bool = True,
    seed: int = 0,
) -> nn.Module:
    """A copy of `model` in which convolutions with stride 2 do what ``nn.MaxPool2d`` of 2 or 3 and stride 2 did.

    Source: Springenberg et al., "Striving for Simplicity" (2015, arXiv 1412.6806). The weights of all other layers are
    shared with `model`, which stays as it is. Train on afterwards.

    Args:
        data: one batch is run to see the channels.
        names: paths of pools; all that fit if left out.
        kind: ``conv`` puts a convolution in the place of the pool, with as many channels; ``stride`` takes the pool
            away and gives the convolution before it stride 2.
        init: of ``conv``: ``box`` starts as the mean of each channel's window, so that a trained network degrades
            gently; ``kaiming`` at random.
        activation: ReLU behind the new convolution, as in the paper.
        seed: of ``kaiming``.

    Raises:
        InputError: names that are no such pools, none in the model, or sizes that would change.
    """
    if kind not in ("conv", "stride"):
        raise unknown_name("kind", kind, ("conv", "stride"))
    if init not in ("box", "kaiming"):
        raise unknown_name("init", init, ("box", "kaiming"))
    fitting = [name for name, module in model.named_modules() if _fits(module)]
    for name in names or ():
        if name not in fitting:
            raise unknown_name("pool", name, fitting)
    chosen = list(names) if names is not None else fitting
    if not chosen:
        raise InputError("model: no nn.MaxPool2d with a window of 2 or 3 and stride 2 in it")
    pools = _run(model, data, chosen)
    copy = structure_copy(model)
    draw = torch.Generator().manual_seed(seed)
    for pool in pools:
        old: Any = copy.get_submodule(pool.name)
        if kind == "conv":
            new: nn.Module = _convolution(old, pool.inputs[1], model, init, draw)
            copy.set_submodule(pool.name, nn.Sequential(new, nn.ReLU()) if activation else new)
        else:
            _stride(copy, pool)
    return copy


def _fits(module: nn.Module) -> bool:
    if not isinstance(module, nn.MaxPool2d) or module.ceil_mode or module.dilation not in (1, (1, 1)):
        return False
    return module.kernel_size in (2, 3, (2, 2), (3, 3)) and module.stride in (2, (2, 2))


def _run(model: nn.Module, data: Any, names: Sequence[str]) -> list[_Pool]:
    """Run one batch and see each pool."""
    seen: dict[str, _Pool] = {}
    last: tuple[str, tuple[int, ...]] = ("", ())

    def see(path: str, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal last
        if path not in names:
            last = path, tuple(output.shape)
            return
        taken = tuple(args[0].shape)
        seen[path] = _Pool(path, taken, tuple(output.shape), last[0] if last[1] == taken else None)

    paths = [path for path, module in model.named_modules() if path in names or isinstance(module, nn.Conv2d)]
    batches = as_calibration(data)
    with torch.no_grad(), evaluating(model), watch_outputs(model, paths, see):
        batches.forward(model, next(iter(batches)))
    if missing := [name for name in names if name not in seen]:
        raise InputError(f"names: {missing[0]} does not run when the data passes")
    return [seen[name] for name in names]


def _convolution(pool: Any, channels: int, model: nn.Module, init: str, draw: torch.Generator) -> nn.Conv2d:
    like = next(model.parameters(), torch.empty(0))
    size = pool.kernel_size if isinstance(pool.kernel_size, int) else pool.kernel_size[0]
    new = nn.Conv2d(channels, channels, size, 2, pool.padding, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        if init == "box":
            window = torch.full((size, size), 1 / size**2, device=like.device, dtype=like.dtype)
            eye = torch.eye(channels, device=like.device, dtype=like.dtype)
            new.weight.copy_(eye[:, :, None, None] * window)
        else:
            exact = torch.empty(new.weight.shape)
            new.weight.copy_(nn.init.kaiming_normal_(exact, nonlinearity="relu", generator=draw))
        if new.bias is not None:
            new.bias.zero_()
    return new


def _stride(copy: nn.Module, pool: _Pool) -> None:
    """Take the pool away and let the convolution before it leave out every second position."""
    if pool.before is None:
        raise InputError(f"names: no convolution whose map {pool.name} pools; use kind='conv'")
    old: Any = copy.get_submodule(pool.before)
    reach = [(k - 1) * d + 1 for k, d in zip(old.kernel_size, old.dilation, strict=True)]
    padding = (
        old.padding if not isinstance(old.padding, str) else [r // 2 if old.padding == "same" else 0 for r in reach]
    )
    sizes = [(n - 1) // 2 + 1 for n in pool.inputs[2:]]
    if tuple(sizes) != pool.outputs[2:]:
        raise InputError(
            f"names: {pool.before} with stride 2 gives {sizes[0]} x {sizes[1]} where {pool.name} gives "
            f"{pool.outputs[2]} x {pool.outputs[3]}; use kind='conv'"
        )
    new = nn.Conv2d(
        old.in_channels, old.out_channels, old.kernel_size, tuple(2 * s for s in old.stride), tuple(padding),
        old.dilation, old.groups, old.bias is not None, old.padding_mode, device="meta",
    )  # fmt: skip
    new.weight, new.bias = old.weight, old.bias
    copy.set_submodule(pool.before, new)
    copy.set_submodule(pool.name, nn.Identity())
