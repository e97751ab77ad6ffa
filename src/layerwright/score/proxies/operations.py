"""Operations of proxy expressions, each guarded so that it is finite whatever goes in."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwright.core.errors import unknown_name

__all__ = ["BINARY", "BOUND", "COMMUTATIVE", "NOT_NEGATIVE", "UNARY", "apply_operation", "arity"]

EPSILON = 1e-9
BOUND = 1e12
"""Every value is clamped to this magnitude: its square still fits float32 with room for a long sum."""

ROWS = 256
"""Rows, evenly spaced, that operations on pairs of rows look at."""


def _away_from_zero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < EPSILON, torch.full_like(x, EPSILON), x)


def _matrix(x: Tensor) -> Tensor:
    """As ``(rows, columns)`` with at most `ROWS` rows."""
    x = x.reshape(1, 1) if x.dim() == 0 else x.unsqueeze(0) if x.dim() == 1 else x.flatten(1)
    if len(x) <= ROWS:
        return x
    return x[torch.linspace(0, len(x) - 1, ROWS, device=x.device).round().long()]


def _normalise(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.std(correction=0) + EPSILON)


def _min_max(x: Tensor) -> Tensor:
    low = x.amin()
    return (x - low) / (x.amax() - low + EPSILON)


def _gram(x: Tensor) -> Tensor:
    rows = _matrix(x)
    return rows @ rows.T


def _row_distances(x: Tensor) -> Tensor:
    rows = _matrix(x)
    return torch.cdist(rows, rows)


def _slogdet(x: Tensor) -> Tensor:
    """``log |det|`` of the mean Gram matrix, by its eigenvalues: a weight is seldom square."""
    rows = _matrix(x).double()
    values = torch.linalg.eigvalsh(rows @ rows.T / rows.shape[1])
    return values.clamp(min=EPSILON).log().sum().float()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (F.normalize(a.flatten(), dim=0, eps=EPSILON) * F.normalize(b.flatten(), dim=0, eps=EPSILON)).sum()


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """Mean divergence of the rows' softmax."""
    first, second = torch.atleast_1d(a).log_softmax(-1), torch.atleast_1d(b).log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1).mean()


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return _matrix(a) @ _matrix(b).T


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "abs_log": lambda x: x.abs().clamp(min=EPSILON).log().abs(),
    "disconnect": torch.zeros_like,
    "exp": lambda x: x.clamp(max=27.0).exp(),
    "frobenius": lambda x: x.square().sum().sqrt(),
    "gram": _gram,
    "invert": lambda x: 1.0 / _away_from_zero(x + EPSILON),
    "l1": lambda x: x.abs().sum(),
    "leaky_relu": F.leaky_relu,
    "log": lambda x: x.clamp(min=EPSILON).log(),
    "log_softmax": lambda x: x.log_softmax(-1),
    "max": torch.amax,
    "mean": torch.mean,
    "min": torch.amin,
    "min_max": _min_max,
    "mish": F.mish,
    "negate": torch.neg,
    "noop": lambda x: x,
    "normalise": _normalise,
    "normalised_sum": lambda x: x.sum() / max(x.numel(), 1) ** 0.5,
    "relu": torch.relu,
    "row_distances": _row_distances,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "slogdet": _slogdet,
    "softmax": lambda x: x.softmax(-1),
    "sqrt": lambda x: x.clamp(min=0.0).sqrt(),
    "square": torch.square,
    "std": lambda x: x.std(correction=0),
    "sum": torch.sum,
    "swish": F.silu,
    "tanh": torch.tanh,
    "var": lambda x: x.var(correction=0),
}
"""Operations of one operand. `disconnect` cuts its branch: the other operand of the next binary operation passes on."""

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "average": lambda a, b: (a + b) / 2,
    "cosine": _cosine,
    "difference": torch.sub,
    "distance": lambda a, b: torch.atleast_1d(a - b).square().sum(-1).sqrt(),
    "equal": lambda a, b: (a == b).float(),
    "greater": lambda a, b: (a > b).float(),
    "hamming": lambda a, b: ((a > 0) != (b > 0)).float().mean(),
    "kl": _kl,
    "l1_distance": lambda a, b: (a - b).abs().mean(),
    "less": lambda a, b: (a < b).float(),
    "matmul": _matmul,
    "mse": lambda a, b: (a - b).square().mean(),
    "product": torch.mul,
}
"""Operations of two operands of one shape."""

COMMUTATIVE = frozenset(
    {"add", "average", "cosine", "distance", "equal", "hamming", "l1_distance", "mse", "product"},
)
NOT_NEGATIVE = frozenset(
    {"abs", "abs_log", "exp", "frobenius", "l1", "min_max", "relu", "row_distances", "sigmoid", "softmax", "sqrt"}
    | {"square", "std", "var", "distance", "equal", "greater", "hamming", "less", "l1_distance", "mse"}
)
"""Operations whose result is never below 0, so that `abs` and `relu` of it change nothing."""


def arity(name: str) -> int:
    """Number of operands.

    Raises:
        InputError: unknown; close names are listed.
    """
    if name in UNARY:
        return 1
    if name in BINARY:
        return 2
    raise unknown_name("operation", name, [*UNARY, *BINARY])


def _guard(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=BOUND, neginf=-BOUND).clamp(-BOUND, BOUND)


def apply_operation(name: str, *operands: Tensor) -> Tensor:
    """The guarded result of an operation on float32 tensors.

    Operands of two shapes: a scalar is broadcast; otherwise both are replaced by their means.

    Raises:
        InputError: an unknown name.
    """
    if arity(name) == 1:
        return _guard(UNARY[name](_guard(operands[0])))
    a, b = (_guard(operand) for operand in operands)
    if a.shape != b.shape:
        if a.numel() == 1 or b.numel() == 1:
            a, b = torch.broadcast_tensors(*(x.reshape(()) if x.numel() == 1 else x for x in (a, b)))
        else:
            a, b = a.mean(), b.mean()
    return _guard(BINARY[name](a, b))
