"""Gates on batches of real state vectors, probabilities, expectations and entanglement: exact, one gate at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["apply_cx", "apply_h", "apply_ry", "expval_z", "ground_state", "meyer_wallach", "probabilities"]

MOST_QUBITS = 16


def ground_state(batch: int, qubits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``|0..0>`` for each sample: ``(batch, 2 ** qubits)``.

    Qubit 0 is the leftmost digit of a basis state's number in base two, as in PennyLane; Qiskit prints it rightmost.

    Raises:
        InputError: a number of qubits outside 1..16.
    """
    if not 1 <= qubits <= MOST_QUBITS:
        raise InputError(f"qubits: got {qubits}, expected 1 to {MOST_QUBITS}")
    state = torch.zeros(batch, 2**qubits, dtype=dtype)
    state[:, 0] = 1
    return state


def apply_ry(state: Tensor, theta: Tensor | float, qubit: int) -> Tensor:
    """Rotate a qubit: ``[[cos t/2, -sin t/2], [sin t/2, cos t/2]]``, one angle ``(batch,)`` for each sample or for all.

    Raises:
        TypeError: a state or angles that are complex or whole numbers.
        InputError: no such qubit, or a state that is not ``(batch, 2 ** qubits)``.
    """
    parts = _split(state, qubit)
    angle = theta if isinstance(theta, Tensor) else torch.tensor(float(theta), dtype=state.dtype, device=state.device)
    if not angle.is_floating_point():
        raise TypeError(f"theta: got {angle.dtype}, expected real floating-point numbers")
    half = angle.reshape(-1, 1, 1) / 2
    cosine, sine = half.cos(), half.sin()
    low, high = parts[:, :, 0], parts[:, :, 1]
    return torch.stack([cosine * low - sine * high, sine * low + cosine * high], 2).reshape(state.shape)


def apply_h(state: Tensor, qubit: int) -> Tensor:
    """The Hadamard gate ``[[1, 1], [1, -1]] / sqrt 2`` on a qubit. Raises as `apply_ry` does."""
    parts = _split(state, qubit)
    low, high = parts[:, :, 0], parts[:, :, 1]
    return torch.stack([low + high, low - high], 2).reshape(state.shape) * math.sqrt(0.5)


def apply_cx(state: Tensor, control: int, target: int) -> Tensor:
    """Flip `target` where `control` is one. Raises as `apply_ry` does, and for a qubit that controls itself."""
    if control == target:
        raise InputError(f"control, target: got {control} for both, expected two qubits")
    _split(state, control), _split(state, target)
    qubits = _qubits(state)
    places = torch.arange(2**qubits, device=state.device)
    on = places >> (qubits - 1 - control) & 1
    return state[:, places ^ (on << (qubits - 1 - target))]


def probabilities(state: Tensor) -> Tensor:
    """Of each basis state: ``(batch, 2 ** qubits)``, the squares of the amplitudes."""
    return state.square()


def expval_z(state: Tensor) -> Tensor:
    """``<Z_k> = sum over b of (-1) ** b_k p_b`` of each qubit: ``(batch, qubits)``."""
    return probabilities(state) @ z_signs(_qubits(state)).to(state)


def z_signs(qubits: int) -> Tensor:
    """``(-1) ** b_k`` for each basis state and qubit: ``(2 ** qubits, qubits)``."""
    digits = torch.arange(2**qubits)[:, None] >> torch.arange(qubits - 1, -1, -1) & 1
    return 1.0 - 2.0 * digits


def meyer_wallach(state: Tensor) -> Tensor:
    """Entanglement in [0, 1] of each sample ``(batch,)``: ``2 (1 - mean over qubits of trace(rho_k ** 2))``.

    Zero for products of single qubits. Source: Meyer and Wallach, "Global entanglement in multiparticle systems"
    (2002); in the form of Brennen (2003).
    """
    purities = []
    for qubit in range(_qubits(state)):
        pair = _split(state, qubit).transpose(1, 2).flatten(2)
        purities.append((pair @ pair.transpose(1, 2)).square().sum((1, 2)))
    return 2 * (1 - torch.stack(purities).mean(0))


def _qubits(state: Tensor) -> int:
    if not state.is_floating_point():
        raise TypeError(f"state: got {state.dtype}, expected real floating-point numbers")
    qubits = state.shape[-1].bit_length() - 1
    if state.dim() != 2 or state.shape[1] != 2**qubits or not qubits:
        raise InputError(f"state: got shape {tuple(state.shape)}, expected (batch, 2 ** qubits)")
    return qubits


def _split(state: Tensor, qubit: int) -> Tensor:
    """``(batch, before, 2, behind)`` with the digits of `qubit` third."""
    qubits = _qubits(state)
    if not 0 <= qubit < qubits:
        raise InputError(f"qubit: got {qubit}, expected 0 to {qubits - 1}")
    return state.reshape(len(state), 2**qubit, 2, 2 ** (qubits - 1 - qubit))
