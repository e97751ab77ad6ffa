"""The adaptive alpha-divergence between a teacher's and a student's distribution."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.transducer import collapse_lattice, lattice_mask

__all__ = ["alpha_divergence", "lattice_divergence"]

Reduction = Literal["mean", "sum", "none"]
_NEAR = 1e-6


def alpha_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha_min: float = -1.0,
    alpha_max: float = 1.0,
    clip: float = 5.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The larger of two alpha-divergences of a student's ``q`` from a teacher's ``p``, at each position (Wang et al.,
    2021, AlphaNet, arXiv 2102.07954).

    ``D_a(p || q) = sum_i q_i (t_i^a - 1) / (a (a - 1))`` with ``t = p / q``; ``KL(p || q)`` for ``a = 1`` and ``KL(q || p)``
    for ``a = 0``. A negative ``a`` punishes a student that is sure where its teacher is not, a positive one a student
    that misses what its teacher finds possible. ``t^a`` is clipped at `clip` (not where ``a`` is 0 or 1), in the value and in the
    gradient, which is that of ``-sum_i q_i rho_i log q_i`` with ``q_i`` and ``rho_i = min(t_i^a, clip) / a`` held fixed:
    the true gradient where nothing is clipped. The teacher gets none. In float32 (float64 if given that).

    Args:
        student_logits, teacher_logits: ``(..., classes)``, before softmax.
        alpha_min, alpha_max: the two; equal ones make it one divergence.
        clip: above 0.
        reduction: ``mean`` over positions, ``sum`` or ``none``.

    Returns:
        A scalar, or ``(...)``.

    Raises:
        InputError: `alpha_min` above `alpha_max`, `clip` not above 0, shapes that differ.
    """
    if not alpha_min <= alpha_max or not math.isfinite(alpha_min) or not math.isfinite(alpha_max):
        raise InputError(f"alpha_min, alpha_max: got {alpha_min}, {alpha_max}, expected the smaller one first")
    if not clip > 0:
        raise InputError(f"clip: got {clip}, expected a number above 0")
    if reduction not in get_args(Reduction):
        raise unknown_name("reduction", str(reduction), get_args(Reduction))
    if student_logits.shape != teacher_logits.shape or not student_logits.dim():
        shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
        raise InputError(f"logits: got {shapes[0]} and {shapes[1]}, expected two of the same shape (..., classes)")
    precise = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    log_q = student_logits.to(precise).log_softmax(-1)
    log_p = teacher_logits.detach().to(precise).log_softmax(-1)
    low = _divergence(log_q, log_p, alpha_min, clip)
    high = _divergence(log_q, log_p, alpha_max, clip) if alpha_max > alpha_min else low
    larger = torch.where(low[0] > high[0], low[1], high[1])
    # The value is the divergence's, the gradient the surrogate's.
    result = torch.maximum(low[0], high[0]) + larger - larger.detach()
    return result.mean() if reduction == "mean" else result.sum() if reduction == "sum" else result


def _divergence(log_q: Tensor, log_p: Tensor, alpha: float, clip: float) -> tuple[Tensor, Tensor]:
    """Value, without a gradient, and the surrogate whose gradient is taken: both ``(...)``."""
    fixed = log_q.detach()
    q, log_t = fixed.exp(), log_p - fixed
    if abs(alpha - 1) < _NEAR:
        p = log_p.exp()
        return (p * log_t).sum(-1), -(p * log_q).sum(-1)
    if abs(alpha) < _NEAR:
        return -(q * log_t).sum(-1), -(q * log_t * log_q).sum(-1)
    weight = (alpha * log_t).clamp(max=math.log(clip)).exp()
    return (q * (weight - 1)).sum(-1) / (alpha * (alpha - 1)), -(q * weight * log_q).sum(-1) / alpha


def lattice_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    *,
    alpha_min: float = -1.0,
    alpha_max: float = 1.0,
    clip: float = 5.0,
) -> Tensor:
    """`alpha_divergence` of transducers, of the next label, blank and all the rest at each node of the lattice.

    Summed over each sample's nodes, mean over the batch: of the order of the transducer loss.

    Args:
        student_logits, teacher_logits: ``(batch, frames, labels + 1, symbols)``.
        targets: ``(batch, labels)``.
        frame_lengths, target_lengths: ``(batch,)``.
        blank: its index.
        alpha_min, alpha_max, clip: see `alpha_divergence`.

    Raises:
        InputError: see `alpha_divergence` and `collapse_lattice`.
    """
    if student_logits.shape != teacher_logits.shape:
        shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
        raise InputError(f"logits: got {shapes[0]} and {shapes[1]}, expected two lattices of the same shape")
    student = collapse_lattice(student_logits, targets, target_lengths, blank)
    teacher = collapse_lattice(teacher_logits.detach(), targets, target_lengths, blank)
    nodes = alpha_divergence(student, teacher, alpha_min, alpha_max, clip, "none")
    inside = lattice_mask(student_logits, frame_lengths, target_lengths)
    return torch.where(inside, nodes, 0.0).sum() / len(targets)
