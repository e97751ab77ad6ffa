"""A circuit's gates brought together into few steps, and products of small matrices."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwright.nn.quantum_circuit import Circuit
from layerwright.nn.quantum_gates import apply_cx, apply_h

__all__ = ["Dense", "Hadamards", "Permuted", "Plan", "Step", "Turns", "blocks", "kronecker", "plan", "product"]

BLOCK = 5
"""Most qubits whose rotations are one matrix for each sample."""
DENSE = 6
"""Most qubits for which fixed gates between rotations are one matrix of all amplitudes."""


@dataclass(frozen=True)
class Turns:
    """Rotations of distinct qubits: the angle of each qubit, or -1."""

    angles: tuple[int, ...]


@dataclass(frozen=True)
class Permuted:
    """Controlled-nots: amplitude ``i`` comes from place ``source[i]``."""

    source: Tensor
    back: Tensor


@dataclass(frozen=True)
class Dense:
    """Fixed gates as one orthogonal matrix, applied as ``state @ matrix``."""

    matrix: Tensor


@dataclass(frozen=True)
class Hadamards:
    """Hadamard gates on some qubits of a circuit that is too large for `Dense`."""

    qubits: tuple[int, ...]


Step = Turns | Permuted | Dense | Hadamards


@dataclass(frozen=True)
class Plan:
    """The start and the steps of a circuit on a device.

    Attributes:
        qubits: of the circuit.
        start: the state before the first rotation ``(2 ** qubits,)``.
        factors: its factors ``(qubits, 2)`` if it is a product of single qubits.
        steps: from the first rotation on.
    """

    qubits: int
    start: Tensor
    factors: Tensor | None
    steps: tuple[Step, ...]


@functools.lru_cache(maxsize=64)
def plan(circuit: Circuit, device: torch.device, dtype: torch.dtype) -> Plan:
    """Bring gates together: fixed ones before any rotation into the start, others into permutations or matrices."""
    qubits, gates = circuit.n_qubits, list(circuit.gates)
    start = torch.zeros(1, 2**qubits, dtype=torch.float64, device="cpu")
    start[0, 0] = 1
    while gates and gates[0][0] != "ry":
        start = _fixed(start, [gates.pop(0)])
    steps: list[Step] = []
    while gates:
        if gates[0][0] == "ry":
            angles = [-1] * qubits
            while gates and gates[0][0] == "ry" and angles[gates[0][1]] < 0:
                gate = gates.pop(0)
                angles[gate[1]] = gate[-1]
            steps.append(Turns(tuple(angles)))
            continue
        fixed = []
        while gates and gates[0][0] != "ry":
            fixed.append(gates.pop(0))
        steps += _fixed_steps(fixed, qubits)
    moved = [_to(step, device, dtype) for step in steps]
    factors = _factors(start[0], qubits)
    return Plan(
        qubits, start[0].to(device, dtype), None if factors is None else factors.to(device, dtype), tuple(moved)
    )


def _fixed(state: Tensor, gates: Sequence[tuple[str, int] | tuple[str, int, int]]) -> Tensor:
    for gate in gates:
        state = apply_h(state, gate[1]) if gate[0] == "h" else apply_cx(state, gate[1], gate[-1])
    return state


def _fixed_steps(gates: Sequence[tuple[str, int] | tuple[str, int, int]], qubits: int) -> list[Step]:
    if any(gate[0] == "h" for gate in gates) and qubits <= DENSE:
        return [Dense(_fixed(torch.eye(2**qubits, dtype=torch.float64, device="cpu"), gates))]
    steps: list[Step] = []
    rest = list(gates)
    while rest:
        if rest[0][0] == "h":
            held: list[int] = []
            while rest and rest[0][0] == "h" and rest[0][1] not in held:
                held.append(rest.pop(0)[1])
            steps.append(Hadamards(tuple(held)))
            continue
        together = []
        while rest and rest[0][0] == "cx":
            together.append(rest.pop(0))
        places = torch.arange(2**qubits, dtype=torch.float64, device="cpu")[None]
        source = _fixed(places, together)[0].long()
        steps.append(Permuted(source, source.argsort()))
    return steps


def _to(step: Step, device: torch.device, dtype: torch.dtype) -> Step:
    if isinstance(step, Permuted):
        return Permuted(step.source.to(device), step.back.to(device))
    return Dense(step.matrix.to(device, dtype)) if isinstance(step, Dense) else step


def _factors(start: Tensor, qubits: int) -> Tensor | None:
    """Single-qubit factors of a product state, found from the row of its largest amplitude; None if it is none."""
    largest = int(start.abs().argmax())
    factors = []
    for qubit in range(qubits):
        bit = 1 << (qubits - 1 - qubit)
        pair = start[[largest & ~bit, largest | bit]]
        factors.append(pair / pair.norm())
    whole = product(torch.stack(factors)[None])[0]
    sign = torch.sign(whole @ start)
    if not torch.allclose(whole * sign, start, atol=1e-9):
        return None
    factors[0] = factors[0] * sign
    return torch.stack(factors)


def product(factors: Tensor) -> Tensor:
    """Kronecker product of vectors: ``(batch, qubits, 2)`` to ``(batch, 2 ** qubits)``, halves first."""
    count = factors.shape[1]
    if count == 1:
        return factors[:, 0]
    left, right = product(factors[:, : count // 2]), product(factors[:, count // 2 :])
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def blocks(qubits: int) -> list[range]:
    """Qubits in as few blocks of nearly equal size as `BLOCK` allows."""
    count = math.ceil(qubits / BLOCK)
    ends = [round(qubits * part / count) for part in range(count + 1)]
    return [range(first, last) for first, last in itertools.pairwise(ends)]


def kronecker(single: Tensor) -> Tensor:
    """``(..., qubits, 2, 2)`` to ``(..., 2 ** qubits, 2 ** qubits)``, halves first."""
    count = single.shape[-3]
    if count == 1:
        return single[..., 0, :, :]
    left, right = kronecker(single[..., : count // 2, :, :]), kronecker(single[..., count // 2 :, :, :])
    size = left.shape[-1] * right.shape[-1]
    whole = left[..., :, None, :, None] * right[..., None, :, None, :]
    return whole.reshape(*single.shape[:-3], size, size)
