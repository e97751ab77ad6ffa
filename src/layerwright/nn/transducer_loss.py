"""The transducer loss: one anti-diagonal of all lattices of a batch at a time, and the gradient from occupancies."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from layerwright.core.errors import InputError, unknown_name

__all__ = ["transducer_loss"]

Reduction = Literal["mean", "sum", "none"]
_NOTHING = float("-inf")


def transducer_loss(
    logits: Tensor,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    reduction: Reduction = "mean",
) -> Tensor:
    """``-log`` of the sum over all alignments of a label sequence with the frames (Graves, 2012, arXiv 1211.3711).

    ``a(t, u) = logaddexp(a(t-1, u) + b(t-1, u), a(t, u-1) + y(t, u-1))`` with the log-probabilities ``b`` of blank and
    ``y`` of the next label; the loss is ``-(a(T-1, U) + b(T-1, U))``. Takes ``T + U`` steps for the whole batch and as many
    back, in float32 (float64 if given that). The gradient is written from occupancies. Peak
    memory beside the logits: one tensor of their size while it runs forward, and one, the gradient, while it runs
    backward; kept in between are the logits and three numbers for each node. It has no second derivative.

    Args:
        logits: ``(batch, frames, labels + 1, symbols)``, before softmax.
        targets: labels ``(batch, labels)``, without blank.
        frame_lengths: ``(batch,)``, 1 to `frames`.
        target_lengths: ``(batch,)``, 0 to `labels`.
        blank: index of the symbol that goes on to the next frame.
        reduction: ``mean`` over the batch, ``sum`` or ``none``.

    Returns:
        A scalar, or ``(batch,)``, in float32 (float64 if given that).

    Raises:
        InputError: shapes or lengths that do not go together, labels out of range, or blank among them.
    """
    _check(logits, targets, frame_lengths, target_lengths, blank, reduction)
    lengths = frame_lengths.to(logits.device).long(), target_lengths.to(logits.device).long()
    losses: Tensor = _Lattice.apply(logits, targets.to(logits.device).long(), *lengths, blank)
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


class _Lattice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, frame_lengths: Tensor, target_lengths: Tensor, blank: int
    ) -> Tensor:
        frames = logits.shape[1]
        precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
        total = logits.to(precise).logsumexp(-1)
        b = logits[..., blank].to(precise) - total
        labels = _labels(targets, target_lengths)
        y = logits.gather(-1, labels[:, None, :, None].expand(-1, frames, -1, 1))[..., 0].to(precise) - total
        b, y = _diagonals(b, _NOTHING), _diagonals(y, _NOTHING)
        alpha = _forward_variables(b, y)
        ends = frame_lengths - 1 + target_lengths, torch.arange(len(logits), device=logits.device), target_lengths
        if ctx.needs_input_grad[0]:
            by_blank, by_label = _occupancies(alpha, b, y, frame_lengths, target_lengths, ends)
            ctx.save_for_backward(logits, total, _rows(by_blank, frames), _rows(by_label, frames), labels)
            ctx.blank = blank
        return -(alpha[ends] + b[ends])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, total, by_blank, by_label, labels = ctx.saved_tensors
        scale = grads[0][:, None, None].to(total.dtype)
        by_blank, by_label = by_blank * scale, by_label * scale
        gradient = torch.sub(logits, total[..., None]).exp_().mul_((by_blank + by_label)[..., None])
        gradient[..., ctx.blank] -= by_blank
        index = labels[:, None, :, None].expand(-1, logits.shape[1], -1, 1)
        gradient.scatter_add_(-1, index, -by_label[..., None])
        return gradient.to(logits.dtype), None, None, None, None


def _labels(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Label ``(batch, labels + 1)`` that leaves each prefix, 0 where none does."""
    live = torch.arange(targets.shape[1], device=targets.device) < target_lengths[:, None]
    return torch.nn.functional.pad(torch.where(live, targets, 0), (0, 1))


def _diagonals(values: Tensor, outside: float) -> Tensor:
    """``result[d, n, u] = values[n, d - u, u]`` of ``(batch, frames, prefixes)``; `outside` where there is no frame."""
    _, frames, prefixes = values.shape
    t, u = _places(frames, prefixes, values.device)
    picked = values[:, t.clamp(0, frames - 1), u].transpose(0, 1)
    return picked.masked_fill(((t < 0) | (t >= frames))[:, None], outside)


def _rows(values: Tensor, frames: int) -> Tensor:
    """The reverse of `_diagonals`."""
    u = torch.arange(values.shape[2], device=values.device)
    return values[torch.arange(frames, device=values.device)[:, None] + u, :, u].permute(2, 0, 1)


def _places(frames: int, prefixes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frame and prefix ``(diagonals, prefixes)`` of each place of each anti-diagonal."""
    u = torch.arange(prefixes, device=device)
    t = torch.arange(frames + prefixes - 1, device=device)[:, None] - u
    return t, u.expand_as(t)


def _forward_variables(b: Tensor, y: Tensor) -> Tensor:
    """Log weights ``(diagonals, batch, prefixes)`` of all paths from (0, 0), one anti-diagonal after the other."""
    alpha = torch.full_like(b, _NOTHING)
    alpha[0, :, 0] = 0
    moved = torch.empty_like(b[0, :, 1:])
    for d in range(1, len(b)):
        torch.add(alpha[d - 1], b[d - 1], out=alpha[d])
        torch.add(alpha[d - 1, :, :-1], y[d - 1, :, :-1], out=moved)
        torch.logaddexp(alpha[d, :, 1:], moved, out=alpha[d, :, 1:])
    return alpha


def _occupancies(
    alpha: Tensor, b: Tensor, y: Tensor, frame_lengths: Tensor, target_lengths: Tensor, ends: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Probabilities ``(diagonals, batch, prefixes)`` that an alignment leaves a node by blank, and by its label.

    Each node hands what it holds back to the two it is reached from, by their shares in its forward variable. These are
    differences of neighbours, so that the size of the whole sum (hundreds of nats) costs no accuracy.
    """
    prefixes = b.shape[2]
    t, u = (place[:, None] for place in _places(len(b) - prefixes + 1, prefixes, b.device))
    inside = (t >= 0) & (u <= target_lengths[:, None])
    may_stay = inside[:-1] & (t[:-1] + 1 < frame_lengths[:, None])
    may_move = inside[:-1] & (t[:-1] < frame_lengths[:, None]) & (u[:-1] < target_lengths[:, None])
    by_blank, by_label = torch.zeros_like(b), torch.zeros_like(y)
    by_blank[ends] = 1
    stay = (alpha[:-1] + b[:-1] - alpha[1:]).exp().masked_fill(~may_stay, 0)
    move = (alpha[:-1, :, :-1] + y[:-1, :, :-1] - alpha[1:, :, 1:]).exp().masked_fill(~may_move[..., :-1], 0)
    held = by_blank[-1].clone()
    for d in range(len(b) - 2, -1, -1):
        torch.mul(held[:, 1:], move[d], out=by_label[d, :, :-1])
        by_blank[d].addcmul_(held, stay[d])
        torch.add(by_blank[d], by_label[d], out=held)
    return by_blank, by_label


def _check(
    logits: Tensor, targets: Tensor, frame_lengths: Tensor, target_lengths: Tensor, blank: int, reduction: str
) -> None:
    if reduction not in get_args(Reduction):
        raise unknown_name("reduction", str(reduction), get_args(Reduction))
    if logits.dim() != 4 or 0 in logits.shape:
        raise InputError(f"logits: got shape {tuple(logits.shape)}, expected (batch, frames, labels + 1, symbols)")
    batch, frames, prefixes, symbols = logits.shape
    if tuple(targets.shape) != (batch, prefixes - 1):
        raise InputError(
            f"targets: got shape {tuple(targets.shape)}, expected {(batch, prefixes - 1)} for logits {tuple(logits.shape)}"
        )
    if not 0 <= blank < symbols:
        raise InputError(f"blank: got {blank}, expected 0 to {symbols - 1}")
    for name, lengths, low, high in (
        ("frame_lengths", frame_lengths, 1, frames),
        ("target_lengths", target_lengths, 0, prefixes - 1),
    ):
        if tuple(lengths.shape) != (batch,) or lengths.is_floating_point():
            raise InputError(
                f"{name}: got shape {tuple(lengths.shape)} of {lengths.dtype}, expected ({batch},) integers"
            )
        if bool(((lengths < low) | (lengths > high)).any()):
            raise InputError(f"{name}: got {lengths.tolist()}, expected {low} to {high}")
    if targets.is_floating_point():
        raise InputError(f"targets: got {targets.dtype}, expected integers")
    real = targets[torch.arange(prefixes - 1, device=targets.device) < target_lengths.to(targets.device)[:, None]]
    if bool((real == blank).any()):
        raise InputError(f"targets: hold blank ({blank}), which is no label")
    if bool(((real < 0) | (real >= symbols)).any()):
        raise InputError(f"targets: got labels outside 0 to {symbols - 1}")
