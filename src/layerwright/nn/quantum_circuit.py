"""Circuits of rotations, Hadamard and controlled-not gates as plain data, and three published ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.quantum_gates import MOST_QUBITS

__all__ = ["CIRCUITS", "Circuit", "bell_circuit", "named_circuit", "real_amplitudes_circuit", "ry_circuit"]

Gate = tuple[str, int] | tuple[str, int, int]
Entangler = Literal["all_pairs", "as_released_groups"]


@dataclass(frozen=True)
class Circuit:
    """Gates in the order in which they act on ``|0..0>``.

    Attributes:
        n_qubits: 1 to 16.
        gates: ``("h", qubit)``, ``("ry", qubit, angle)`` and ``("cx", control, target)``. Each angle 0, 1, ... enters
            one rotation.
        text: the gates as one line, such as ``h 0;ry 0 0``.

    Raises:
        InputError: qubits outside the circuit, an unknown gate, or angles that are missing or enter twice.
    """

    n_qubits: int
    gates: tuple[Gate, ...]
    text: str = field(repr=False, compare=False)

    def __init__(self, n_qubits: int, gates: Sequence[Gate]) -> None:
        object.__setattr__(self, "n_qubits", n_qubits)
        object.__setattr__(self, "gates", tuple(tuple(gate) for gate in gates))
        object.__setattr__(self, "text", ";".join(" ".join(map(str, gate)) for gate in self.gates))
        if not 1 <= n_qubits <= MOST_QUBITS:
            raise InputError(f"n_qubits: got {n_qubits}, expected 1 to {MOST_QUBITS}")
        for gate in self.gates:
            name, *places = gate
            if name not in ("h", "ry", "cx"):
                raise unknown_name("gate", str(name), ("h", "ry", "cx"))
            qubits = places if name == "cx" else places[:1]
            if len(places) != (1 if name == "h" else 2) or not all(0 <= q < n_qubits for q in qubits):
                raise InputError(f"gates: {gate} does not fit {n_qubits} qubits")
            if name == "cx" and places[0] == places[1]:
                raise InputError(f"gates: {gate} controls itself")
        entered = sorted(gate[2] for gate in self.gates if len(gate) == 3 and gate[0] == "ry")
        if entered != list(range(len(entered))):
            raise InputError(f"gates: angles {entered} enter, expected each of 0 to {max(0, len(entered) - 1)} once")

    @property
    def n_angles(self) -> int:
        """Rotations, each with an angle of its own."""
        return sum(gate[0] == "ry" for gate in self.gates)


def ry_circuit(n_qubits: int = 4) -> Circuit:
    """No entanglement: H on all, Ry on each. Source: Sebastianelli et al. (2022, arXiv 2109.09484)."""
    _check_qubits(n_qubits)
    qubits = range(n_qubits)
    return Circuit(n_qubits, [("h", q) for q in qubits] + [("ry", q, q) for q in qubits])


def bell_circuit(n_qubits: int = 4) -> Circuit:
    """H on the first, a ladder of CX, Ry on each, the ladder backwards, H on the first.

    The ladder's CX(k + 1, k) of the first half have controls in ``|0>`` and do nothing; those of the second entangle.
    Source: Sebastianelli et al. (2022, arXiv 2109.09484).
    """
    _check_qubits(n_qubits)
    ladder: list[Gate] = [("cx", q + 1, q) for q in range(n_qubits - 1)]
    turns: list[Gate] = [("ry", q, q) for q in range(n_qubits)]
    return Circuit(n_qubits, [("h", 0), *ladder, *turns, *ladder[::-1], ("h", 0)])


def real_amplitudes_circuit(n_qubits: int = 4, reps: int = 1, entangler: Entangler = "all_pairs") -> Circuit:
    """H on all, then Ry on each, and `reps` times CX between all pairs and Ry on each: ``n (reps + 1)`` angles.

    Source: Sebastianelli et al. (2022, arXiv 2109.09484).

    Args:
        n_qubits: 1 to 16.
        reps: at least 0; 1 in the paper.
        entangler: ``all_pairs``: CX(k, j) for all ``k > j``, j in order; ``as_released_groups``: what the notebooks of
            the fine classifiers have, for four qubits, where a doubled CX(1, 2) cancels itself.

    Raises:
        InputError: a number outside its range, or an unknown entangler.
    """
    _check_qubits(n_qubits)
    if reps < 0:
        raise InputError(f"reps: got {reps}, expected at least 0")
    if entangler == "all_pairs":
        pairs = [(k, j) for j in range(n_qubits) for k in range(j + 1, n_qubits)]
    elif entangler == "as_released_groups":
        if n_qubits != 4:
            raise InputError(f"entangler: as_released_groups is for 4 qubits, got {n_qubits}")
        pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 2), (2, 3)]
    else:
        raise unknown_name("entangler", entangler, ("all_pairs", "as_released_groups"))
    gates: list[Gate] = [("h", q) for q in range(n_qubits)]
    for layer in range(reps + 1):
        gates += [("cx", k, j) for k, j in pairs] if layer else []
        gates += [("ry", q, q + layer * n_qubits) for q in range(n_qubits)]
    return Circuit(n_qubits, gates)


CIRCUITS: Mapping[str, Callable[[int], Circuit]] = {
    "bell": bell_circuit,
    "real_amplitudes": real_amplitudes_circuit,
    "ry": ry_circuit,
}


def named_circuit(name: str, n_qubits: int = 4) -> Circuit:
    """One of `CIRCUITS`. Raises InputError for another name."""
    if name not in CIRCUITS:
        raise unknown_name("circuit", name, CIRCUITS)
    return CIRCUITS[name](n_qubits)


def _check_qubits(n_qubits: int) -> None:
    if not 1 <= n_qubits <= MOST_QUBITS:
        raise InputError(f"n_qubits: got {n_qubits}, expected 1 to {MOST_QUBITS}")
