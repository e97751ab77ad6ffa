"""A kernel as a sum of products of four vectors, by alternating least squares."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SWEEPS", "cp_factors"]

SWEEPS = 30
"""How often all factors are fitted in turn at most: 100 take three times as long for a twentieth less error."""

_SETTLED = 1e-15
_SMALL = 1 << 21
_RIDGE = 1e-7


@torch.no_grad()
def cp_factors(
    kernel: Tensor, rank: int, *, seed: int = 0, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors of ``kernel[f, c, i, j] ~ sum_r a[f, r] b[c, r] u[i, r] v[j, r]``, by alternating least squares.

    Started from the singular vectors of the four unfoldings, the first ones scaled by their singular values, with
    normal columns where a size is below `rank`. Every component gets the same norm in all four factors. The small
    systems are solved in float64; a sweep takes two products of the kernel with `rank` columns, as both modes of the kernel's area share that of the inputs.

    Args:
        kernel: float ``(out, in, height, width)``.
        rank: number of components.
        seed: of the random columns.
        sweeps: at most; fewer where the error no longer falls.

    Returns:
        float32 ``(out, rank)``, ``(in, rank)``, ``(height, rank)``, ``(width, rank)``.

    Source: Carroll and Chang (1970), Harshman (1970); for kernels Lebedev et al. (2015).
    """
    tensor = kernel.double()
    generator = torch.Generator().manual_seed(seed)
    a, b, u, v = (_start(tensor, mode, rank, generator) for mode in range(4))
    energy = float(tensor.square().sum())
    if energy == 0:
        zero = [torch.zeros(size, rank, device=kernel.device) for size in kernel.shape]
        return zero[0], zero[1], zero[2], zero[3]
    out, in_, height, width = kernel.shape
    # The large products decide the time: in float32, but where they are quick anyhow.
    wide = torch.float64 if kernel.numel() * rank <= _SMALL else torch.float32
    by_inputs = tensor.to(wide).permute(0, 2, 3, 1).reshape(-1, in_)
    by_outputs = tensor.to(wide).permute(1, 2, 3, 0).reshape(-1, out)
    before = float("inf")
    for _ in range(sweeps):
        # (out, height * width, rank), then (in, height * width, rank): the large products, once for each side.
        places = (u[:, None] * v).flatten(0, 1).to(wide)
        part = (by_inputs @ b.to(wide)).view(out, height * width, rank)
        a = _solve((part * places).sum(1).double(), _gram(b) * _gram(u) * _gram(v))
        part = (by_outputs @ a.to(wide)).view(in_, height * width, rank)
        b = _solve((part * places).sum(1).double(), _gram(a) * _gram(u) * _gram(v))
        inner = torch.einsum("ckr,cr->kr", part, b.to(wide)).view(height, width, rank).double()
        u = _solve((inner * v).sum(1), _gram(a) * _gram(b) * _gram(v))
        target = (inner * u[:, None]).sum(0)
        moments = _gram(a) * _gram(b) * _gram(u)
        v = _solve(target, moments)
        if wide == torch.float64:
            error = float((tensor - torch.einsum("fr,cr,ir,jr->fcij", a, b, u, v)).square().sum())
        else:
            # Without multiplying out; its rounding hides errors below about 1e-10 of the energy.
            error = energy - 2 * float((target * v).sum()) + float((moments * _gram(v)).sum())
        if before - error < _SETTLED * energy:
            break
        before = error
    if wide == torch.float64:
        # Once more without normal equations, which cost half the digits.
        others = torch.einsum("cr,ir,jr->cijr", b, u, v).flatten(0, 2)
        a = torch.linalg.lstsq(others, tensor.flatten(1).T, driver="gelsd").solution.T
    return _balance(a, b, u, v)


def _start(tensor: Tensor, mode: int, rank: int, generator: torch.Generator) -> Tensor:
    unfolded = tensor.movedim(mode, 0).flatten(1)
    # Left singular vectors from the small gram.
    energy, vectors = torch.linalg.eigh(unfolded @ unfolded.T)
    vectors = vectors.flip(-1)[:, :rank]
    if mode == 0:
        vectors = vectors * energy.flip(-1)[:rank].clamp(min=0).sqrt()
    missing = rank - vectors.shape[1]
    drawn = torch.randn(tensor.shape[mode], missing, generator=generator, dtype=torch.float64).to(tensor.device)
    return torch.cat([vectors, drawn], 1)


def _gram(factor: Tensor) -> Tensor:
    return factor.T @ factor


def _solve(target: Tensor, moments: Tensor) -> Tensor:
    """``target @ moments^-1``, slightly damped: components that coincide would make it singular."""
    diagonal = moments.diagonal()
    damped = moments + torch.diag(_RIDGE * (diagonal.mean() + diagonal))
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) == 0:
        return torch.cholesky_solve(target.T, lower).T
    return target @ torch.linalg.pinv(moments, hermitian=True, rtol=1e-12)


def _balance(*factors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    share = norms.prod(0) ** 0.25
    even = [(factor * (share / norm.clamp(min=1e-300))).float() for factor, norm in zip(factors, norms, strict=True)]
    return even[0], even[1], even[2], even[3]
