"""Circuits as products of dense matrices, from Kronecker products of 2 x 2 ones, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

EYE = torch.eye(2, dtype=torch.float64)
H = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
ZERO = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
ONE = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
X = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)


def ry(angle: float) -> Tensor:
    """The rotation of one qubit."""
    c, s = math.cos(angle / 2), math.sin(angle / 2)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def on_qubits(qubits: int, factors: dict[int, Tensor]) -> Tensor:
    """Kronecker product over all qubits, the first one leftmost; identity where no factor is given."""
    whole = torch.ones(1, 1, dtype=torch.float64)
    for qubit in range(qubits):
        whole = torch.kron(whole, factors.get(qubit, EYE))
    return whole


def unitary(qubits: int, gates: Sequence[tuple[object, ...]], angles: Sequence[float]) -> Tensor:
    """Matrix of a whole circuit."""
    whole = torch.eye(2**qubits, dtype=torch.float64)
    for name, *places in gates:
        first, last = int(places[0]), int(places[-1])  # type: ignore[call-overload]
        if name == "h":
            gate = on_qubits(qubits, {first: H})
        elif name == "ry":
            gate = on_qubits(qubits, {first: ry(float(angles[last]))})
        else:
            gate = on_qubits(qubits, {first: ZERO}) + on_qubits(qubits, {first: ONE, last: X})
        whole = gate @ whole
    return whole


def states(qubits: int, gates: Sequence[tuple[object, ...]], angles: Tensor) -> Tensor:
    """Last states for angles ``(batch, n_angles)``, one sample at a time."""
    return torch.stack([unitary(qubits, gates, row.tolist())[:, 0] for row in angles])


def meyer_wallach(state: Tensor) -> float:
    """By the definition with wedge products: ``4 / n sum over qubits of the squared areas between both halves``."""
    qubits = int(math.log2(len(state)))
    total = 0.0
    for qubit in range(qubits):
        bit = 1 << (qubits - 1 - qubit)
        low = torch.stack([state[i] for i in range(len(state)) if not i & bit])
        high = torch.stack([state[i] for i in range(len(state)) if i & bit])
        for i in range(len(low)):
            for j in range(i):
                total += float(low[i] * high[j] - low[j] * high[i]) ** 2
    return 4 * total / qubits
