"""Adam whose steps are a share of each parameter's size, and that learns the size too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from layerwright.core.errors import InputError

__all__ = ["ScaledAdam"]

_SCALAR_RATE = 0.1
"""Rate of scalars and of sizes, as a share of the others'."""
_REMEMBERED = 100
"""Steps whose norms the clipping looks at."""


class ScaledAdam(Optimizer):
    """Adam with updates in proportion to the root mean square of each parameter (Yao et al., 2023, Zipformer, arXiv
    2310.11230), so that parameters and sub-networks with gradients of unlike sizes learn at one rate.

    A tensor of several numbers moves by ``lr r g / sqrt(v)``, ``r`` its root mean square (at least `min_rms`), and every
    `size_period` steps along itself, as Adam on the logarithm of its size would; beyond `max_rms` it shrinks. A single
    number is stepped by Adam at a tenth of the rate, within `scalar_max`. A parameter that is all zeros hardly moves:
    start it with small numbers. Half precision is stepped in float32. Memory: two tensors for each parameter.

    Args:
        params: parameters or groups of them; those without a gradient are left out of a step.
        lr: share of its size that a parameter moves by, above 0; 0.03 to 0.045 is usual.
        betas: decay of the update and of the squared gradient, 0 to below 1.
        clipping_scale: gradients are scaled down where their norm, ``sqrt(sum |g|^2 r^2)`` over a group, is more than
            this many times its median of the last 100 steps; None does without.
        eps: added to the root of the squared gradient.
        min_rms, max_rms: sizes; below the first, a size is not learned.
        scalar_max: bound on single numbers.
        size_period: steps between two of the size.

    Raises:
        InputError: a number out of its range.
        RuntimeError: in a step, a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.98),
        clipping_scale: float | None = None,
        eps: float = 1e-8,
        min_rms: float = 1e-5,
        max_rms: float = 3.0,
        scalar_max: float = 2.0,
        size_period: int = 4,
    ) -> None:
        if not (math.isfinite(lr) and lr > 0):
            raise InputError(f"lr: got {lr}, expected a positive number")
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"betas: got {betas}, expected two from 0 to below 1")
        if clipping_scale is not None and not clipping_scale > 0:
            raise InputError(f"clipping_scale: got {clipping_scale}, expected a number above 0, or None")
        if not (eps > 0 and 0 < min_rms < max_rms and scalar_max > 0 and size_period >= 1):
            raise InputError("eps, min_rms, scalar_max must be above 0, max_rms above min_rms, size_period at least 1")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "clipping_scale": clipping_scale,
                "eps": eps,
                "min_rms": min_rms,
                "max_rms": max_rms,
                "scalar_max": scalar_max,
                "size_period": size_period,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; `closure` computes the loss again, with gradients.

        Raises:
            RuntimeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in stepped):
                raise RuntimeError("ScaledAdam does not take sparse gradients; build the embedding with sparse=False")
            for p in stepped:
                if not self.state[p]:
                    self.state[p] = _start(p, group)
            scale = self._clipping(group, stepped)
            for p in stepped:
                _step_(p, p.grad.float() if scale is None else p.grad.float() * scale, self.state[p], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; what belongs to parameters of half precision is in float32 again."""
        super().load_state_dict(state_dict)
        for own in self.state.values():
            own |= {name: value.float() for name, value in own.items() if isinstance(value, Tensor)}

    def _clipping(self, group: dict[str, Any], stepped: list[Tensor]) -> float | None:
        """What all gradients of the group are multiplied by; None where they are not."""
        if group["clipping_scale"] is None or not stepped:
            return None
        norms = [p.grad.float().norm() * self.state[p].get("rms", 1.0) for p in stepped if p.grad is not None]
        norm = float(torch.stack([n.reshape(()) for n in norms]).norm())
        history: list[float] = group.setdefault("norms", [])
        bound = group["clipping_scale"] * statistics.median(history) if len(history) >= _REMEMBERED // 10 else math.inf
        if math.isfinite(norm):
            group["norms"] = [*history, norm][-_REMEMBERED:]
        return bound / norm if norm > bound else None


def _start(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {
        "step": 0,
        "delta": torch.zeros_like(p, dtype=torch.float32),
        "squares": torch.zeros_like(p, dtype=torch.float32),
    }
    if p.numel() > 1:
        state["rms"] = _rms(p)
        state["along"] = torch.zeros(group["size_period"], device=p.device)
        state["along_squares"] = torch.zeros((), device=p.device)
    return state


def _rms(p: Tensor) -> Tensor:
    return p.float().square().mean().sqrt()


def _step_(p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Move `p` and its state by one step, in place."""
    (beta1, beta2), rate, step = group["betas"], group["lr"], state["step"]
    delta: Tensor = state["delta"].mul_(beta1)
    several = p.numel() > 1
    if several:
        _learn_size_(p, gradient, state, group)
    squares = state["squares"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    direction = gradient / (squares / (1 - beta2 ** (step + 1))).sqrt_().add_(group["eps"])
    if several:
        delta.sub_(direction * ((1 - beta1) * rate * state["rms"].clamp(min=group["min_rms"])))
    else:
        delta.sub_(direction, alpha=(1 - beta1) * _SCALAR_RATE * rate)
        p.clamp_(-group["scalar_max"], group["scalar_max"])
    p.add_(delta.to(p.dtype)) if p.dtype in (torch.float32, torch.float64) else p.copy_(p.float() + delta)
    state["step"] = step + 1


def _learn_size_(p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Note the gradient of the size, and at the end of a period step it, in place."""
    period, step, rate = group["size_period"], state["step"], group["lr"]
    beta1, beta2 = group["betas"][0], group["betas"][1] ** period
    state["along"][step % period] = (p * gradient).sum()
    if step % period < period - 1:
        return
    rms = state["rms"].copy_(_rms(p))
    along = state["along"]
    squares = state["along_squares"].mul_(beta2).add_(along.square().mean(), alpha=1 - beta2)
    corrected = math.sqrt(1 - beta2 ** ((step + 1) // period))
    change = -_SCALAR_RATE * rate * corrected * along.sum() / (squares.sqrt() + group["eps"])
    change = change.masked_fill(rms < group["min_rms"], 0.0)
    change = change.masked_fill(rms > group["max_rms"], -_SCALAR_RATE * rate * period)
    state["delta"].add_(p * change, alpha=1 - beta1)
