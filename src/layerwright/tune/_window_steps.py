"""Optimizers of windows: one for each exit, alive only while that exit is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.tune._loop import _master, _order, _step_

__all__ = ["WindowOptimizers", "batch_order", "zero_masks"]

batch_order = _order


def zero_masks(blocks: Iterable[nn.Module]) -> dict[int, Tensor]:
    """By ``id`` of a matrix in `blocks` that is partly zero, where it is not zero (bool)."""
    masks = {}
    for block in blocks:
        for parameter in block.parameters():
            if parameter.dim() < 2 or not parameter.is_floating_point():
                continue
            kept = parameter.detach() != 0
            if bool(kept.any()) and not bool(kept.all()):
                masks[id(parameter)] = kept
    return masks


class WindowOptimizers:
    """AdamW for each exit, made when it is first taken.

    Args:
        parameters: what each exit trains.
        masks: see `zero_masks`; these places are set to zero again after every step.
        drop: forget an exit's states once another is taken; otherwise they move to main memory.
    """

    def __init__(
        self, parameters: Mapping[int, list[nn.Parameter]], masks: Mapping[int, Tensor], *, drop: bool
    ) -> None:
        self._parameters, self._masks, self._drop = parameters, masks, drop
        self._made: dict[int, tuple[Any, list[nn.Parameter]]] = {}
        self._current: int | None = None

    def take_(self, place: int, rate: float, weight_decay: float) -> None:
        """Make exit `place` the one that is trained: only its parameters require gradients."""
        if place != self._current:
            self.close_()
            for parameter in self._parameters[place]:
                parameter.requires_grad_(True)
            self._current = place
            self._open(place, weight_decay)
        for group in self._made[place][0].param_groups:
            group["lr"] = rate

    def step_(self, place: int, clip: float) -> None:
        """One optimizer step; masked places stay zero."""
        optimizer, masters = self._made[place]
        trained = self._parameters[place]
        _step_(optimizer, trained, masters, clip)
        with torch.no_grad():
            for parameter, master in zip(trained, masters, strict=True):
                kept = self._masks.get(id(parameter))
                if kept is not None:
                    parameter.mul_(kept)
                    if master is not parameter:
                        master.mul_(kept)

    def state_bytes(self, place: int) -> int:
        """Bytes of the states that lie where the parameters of `place` do."""
        device = self._parameters[place][0].device
        return sum(
            t.numel() * t.element_size()
            for optimizer, _ in self._made.values()
            for state in optimizer.state.values()
            for t in state.values()
            if isinstance(t, Tensor) and t.dim() and t.device == device
        )

    def close_(self) -> None:
        """End the current exit's turn."""
        place, self._current = self._current, None
        if place is None:
            return
        for parameter in self._parameters[place]:
            parameter.requires_grad_(False)
            parameter.grad = None
        if self._drop:
            del self._made[place]
        else:
            _move_states_(self._made[place][0], torch.device("cpu"))

    def _open(self, place: int, weight_decay: float) -> None:
        trained = self._parameters[place]
        if place not in self._made:
            masters = [p if p.dtype in (torch.float32, torch.float64) else _master(p) for p in trained]
            groups = [
                {"params": [m for m in masters if m.dim() >= 2], "weight_decay": weight_decay},
                {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
            ]
            self._made[place] = (torch.optim.AdamW(groups, betas=(0.9, 0.999)), masters)
            return
        optimizer, masters = self._made[place]
        _move_states_(optimizer, trained[0].device)
        with torch.no_grad():
            for parameter, master in zip(trained, masters, strict=True):
                # Windows may overlap: another exit may have trained this weight since.
                if master is not parameter and not torch.equal(master.to(parameter.dtype), parameter):
                    master.copy_(parameter)


def _move_states_(optimizer: Any, device: torch.device) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[name] = value.to(device)
