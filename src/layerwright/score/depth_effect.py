"""How much deep blocks do: variance of the residual stream, angles between blocks, what is lost without each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.blocks import Blocks, find_blocks
from layerwright.core.calibration import Calibration, as_calibration, evaluating
from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError
from layerwright.core.skip import skip_blocks

__all__ = ["angular_distance", "drop_impact", "identity_gap", "residual_variance"]


def residual_variance(model: nn.Module, data: Calibration | Any) -> dict[str, float]:
    """Variance over features of the residual stream after each block, mean over tokens, by block (Sun et al., 2025,
    arXiv 2502.05795). Padding does not count. One forward pass; float32 sums.
    """
    stack = _stack(model)
    sums, counts = torch.zeros(len(stack), dtype=torch.float64), 0.0
    for states, real in _streams(model, stack, as_calibration(data)):
        variances = torch.stack([state.float().var(-1, unbiased=False) for state in states[1:]])
        sums += (variances * real).flatten(1).sum(1).double().cpu()
        counts += float(real.expand(variances.shape[1:]).sum())
    return dict(zip(stack.names, (sums / counts).tolist(), strict=True))


def angular_distance(
    model: nn.Module, data: Calibration | Any, n: int = 1, *, tokens: Literal["last", "all"] = "last"
) -> dict[str, float]:
    """``arccos(cos(x_l, x_{l + n})) / pi`` between the inputs of blocks `n` apart, mean over samples, by the first block.

    0 says that these blocks turn nothing, 1 that they reverse it (Gromov et al., 2024, arXiv 2403.17887). The output of
    the last block is the last "input".

    Args:
        model: any model of blocks.
        data: batches.
        n: blocks that are passed, 1 to the number of blocks less 1.
        tokens: the last real token of each sample, or all real ones.

    Raises:
        InputError: `n` outside its range.
    """
    stack = _stack(model)
    if isinstance(n, bool) or not 1 <= n < len(stack):
        raise InputError(f"n: got {n}, expected 1 to {len(stack) - 1} for {len(stack)} blocks")
    starts = len(stack) + 1 - n
    sums, counts = torch.zeros(starts, dtype=torch.float64), 0.0
    for states, real in _streams(model, stack, as_calibration(data)):
        weight = real if tokens == "all" else _last(real.expand(states[0].shape[:-1]))
        for start in range(starts):
            cosine = nn.functional.cosine_similarity(states[start].double(), states[start + n].double(), dim=-1)
            sums[start] += float((cosine.clamp(-1, 1).arccos() / math.pi * weight).sum())
        counts += float(weight.expand(states[0].shape[:-1]).sum())
    return dict(zip(stack.names, (sums / counts).tolist(), strict=False))


def drop_impact(
    model: nn.Module, data: Calibration | Any, metric: Callable[[nn.Module], float] | None = None
) -> dict[str, float]:
    """The loss (or `metric`) without each block minus that of the whole model, by block. One pass for each block."""
    found = as_calibration(data)
    measure = metric or found.mean_loss
    whole = measure(model)
    impact = {}
    for name in _stack(model).names:
        with skip_blocks(model, [name]):
            impact[name] = measure(model) - whole
    return impact


def identity_gap(model: nn.Module, data: Calibration | Any, num_probes: int = 4, *, seed: int = 0) -> dict[str, float]:
    """``||J v - v|| / ||v||`` of each block's Jacobian for random `v`, root mean square over probes: 0 is an identity.

    Forward-mode derivatives on the first batch; one forward for each block and probe.

    Raises:
        InputError: fewer than one probe.
    """
    if num_probes < 1:
        raise InputError(f"num_probes: got {num_probes}, expected 1 or more")
    stack = _stack(model)
    batch = next(iter(as_calibration(data)))
    calls: dict[str, tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, kwargs, name=name: calls.__setitem__(name, _split(args, kwargs)), with_kwargs=True
        )
        for name in stack.names
    ]
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model), torch.no_grad():
        try:
            as_calibration(data).forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return {
            name: _gap(model.get_submodule(name), *calls[name], probes=num_probes, generator=generator)
            for name in stack.names
        }


def _gap(
    block: nn.Module,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    probes: int,
    generator: torch.Generator,
) -> float:
    def run(value: Tensor) -> Tensor:
        return first_tensor(block(value, *args, **kwargs))

    total = 0.0
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):  # the fused products have no forward derivative
        for _ in range(probes):
            v = torch.randn(x.shape, generator=generator).to(x)
            moved = torch.func.jvp(run, (x,), (v,))[1] - v
            total += float(moved.square().sum() / v.square().sum())
    return math.sqrt(total / probes)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states, and the other arguments of a block's call."""
    if not args or not isinstance(args[0], Tensor):
        raise InputError("blocks are not called with hidden states as their first argument; identity_gap needs that")
    return args[0].detach(), args[1:], kwargs


def _stack(model: nn.Module) -> Blocks:
    """The blocks of the model, the last stack where it has several."""
    return find_blocks(model)[-1]


def _streams(model: nn.Module, stack: Blocks, data: Calibration) -> Any:
    """For each batch: the inputs of all blocks and the output of the last ``[(batch, tokens, hidden)]``, and a mask of
    real tokens ``(batch, tokens)``.
    """
    states: list[Tensor] = []

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        states.append(first_tensor(args or kwargs).detach())

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(first_tensor(output).detach())

    modules = stack.modules(model)
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles.append(modules[-1].register_forward_hook(after))
    try:
        with evaluating(model), torch.no_grad():
            for batch in data:
                states.clear()
                data.forward(model, batch)
                mask = batch.get("attention_mask") if isinstance(batch, dict) else None
                real = torch.ones(states[0].shape[:-1], device=states[0].device) if mask is None else mask.float()
                yield list(states), real.to(states[0].device)
    finally:
        for handle in handles:
            handle.remove()


def _last(real: Tensor) -> Tensor:
    """1 at the last real token of each sample, 0 elsewhere."""
    places = torch.arange(1, real.shape[-1] + 1, device=real.device) * (real > 0)
    return (places == places.amax(-1, keepdim=True)).float() * (real > 0)
