"""A circuit without weights of its own as a layer: features are its angles, probabilities its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, require_extra, unknown_name
from layerwright.nn.quantum_circuit import Circuit, named_circuit
from layerwright.nn.quantum_gates import probabilities, z_signs
from layerwright.nn.quantum_state import circuit_state

__all__ = ["QuantumLayer"]

Readout = Literal["probs", "expval"]
Grad = Literal["backprop", "parameter_shift", "released"]
Backend = Literal["torch", "pennylane"]
_SHIFTS = {"parameter_shift": (math.pi / 2, 0.5), "released": (math.pi / 4, 1.0)}
"""Shift of an angle, and the factor of the difference: ``1 / (2 sin shift)`` is exact."""
_AT_ONCE = 1 << 22
"""Amplitudes of shifted circuits that are computed together."""


class QuantumLayer(nn.Module):
    """What is measured behind a `Circuit` whose angles are the inputs. It has no parameters.

    Basis states are in the order of their digits, qubit 0 leftmost (as PennyLane; Qiskit's words read backwards).
    Computed in float32 or float64 and returned in the dtype of the angles. A layer of rotations of a sample takes up to
    ``32 * 2 ** n`` multiply-adds for every five qubits; memory for one state.

    Source: Sebastianelli et al., "On Circuit-based Hybrid Quantum Neural Networks for Remote Sensing Imagery
    Classification" (2022, arXiv 2109.09484).

    Args:
        circuit: or a name out of `CIRCUITS`, with four qubits.
        readout: ``probs`` of all basis states, or ``expval``, ``<Z_k>`` of each qubit.
        shots: of measurement; None for exact probabilities.
        grad: ``backprop`` is exact and fastest; ``parameter_shift`` exact from two more evaluations for each angle, as
            hardware allows; ``released`` is that of the published notebooks: shifts of pi / 4 without a factor, sqrt 2
            times the exact gradient.
        backend: ``pennylane`` evaluates circuits with its ``default.qubit``, to compare with.
        seed: of the shots; None draws from torch's generator.
        depolarising: share in [0, 1] by which probabilities are mixed with equal ones, before shots.

    Raises:
        InputError: an unknown name, shots below 1, ``backprop`` with shots, or a share outside [0, 1].
        ImportError: ``pennylane`` is asked for and not installed.
    """

    def __init__(
        self,
        circuit: Circuit | str = "real_amplitudes",
        readout: Readout = "probs",
        shots: int | None = None,
        grad: Grad = "backprop",
        backend: Backend = "torch",
        seed: int | None = None,
        *,
        depolarising: float = 0.0,
    ) -> None:
        super().__init__()
        for name, given, known in (("readout", readout, Readout), ("grad", grad, Grad), ("backend", backend, Backend)):
            if given not in get_args(known):
                raise unknown_name(name, given, get_args(known))
        if shots is not None and shots < 1:
            raise InputError(f"shots: got {shots}, expected at least 1, or None for exact probabilities")
        if shots is not None and grad == "backprop":
            raise InputError("grad: 'backprop' does not go through shots; use 'parameter_shift' or 'released'")
        if not 0 <= depolarising <= 1:
            raise InputError(f"depolarising: got {depolarising}, expected 0 to 1")
        self.circuit = named_circuit(circuit) if isinstance(circuit, str) else circuit
        self.readout, self.shots, self.grad, self.backend = readout, shots, grad, backend
        self.seed, self.depolarising = seed, depolarising
        self.draws = 0
        self.register_buffer("signs", z_signs(self.circuit.n_qubits), persistent=False)
        self._node = _pennylane_probabilities(self.circuit) if backend == "pennylane" else None

    signs: Tensor

    @property
    def n_angles(self) -> int:
        """Features of the inputs."""
        return self.circuit.n_angles

    @property
    def n_outputs(self) -> int:
        """Features of the outputs: ``2 ** n_qubits``, or ``n_qubits`` for ``expval``."""
        qubits = self.circuit.n_qubits
        return 2**qubits if self.readout == "probs" else qubits

    def forward(self, angles: Tensor) -> Tensor:
        """``(..., n_outputs)`` of angles ``(..., n_angles)``.

        Raises:
            TypeError: complex or whole numbers.
            InputError: another number of angles.
        """
        if not angles.is_floating_point():
            raise TypeError(f"angles: got {angles.dtype}, expected real floating-point numbers")
        if angles.dim() < 1 or angles.shape[-1] != self.n_angles:
            given = angles.shape[-1] if angles.dim() else "one number"
            raise InputError(f"angles: got {given}, expected {self.n_angles} for each sample, as the circuit has")
        flat = angles.reshape(-1, self.n_angles)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        if self.grad == "backprop":
            measured = self.measure(flat)
        else:
            shift, factor = _SHIFTS[self.grad]
            measured = _Shifted.apply(flat, self.measure, shift, factor, self.circuit.n_qubits)
        return measured.reshape(*angles.shape[:-1], self.n_outputs).to(angles.dtype)

    def measure(self, angles: Tensor) -> Tensor:
        """Measurements ``(batch, n_outputs)`` of ``(batch, n_angles)`` in float32 or float64."""
        shares = self._node(angles) if self._node else probabilities(circuit_state(angles, self.circuit))
        if self.depolarising:
            shares = torch.lerp(shares, torch.full_like(shares, 1 / shares.shape[1]), self.depolarising)
        if self.shots is not None:
            shares = self._counted(shares)
        return shares if self.readout == "probs" else shares @ self.signs.to(shares)

    def _counted(self, shares: Tensor) -> Tensor:
        """Shares of `shots` draws from the probabilities."""
        generator = None
        if self.seed is not None:
            # Every call draws anew, and a copied or saved layer needs no generator.
            generator = torch.Generator(shares.device).manual_seed(self.seed + self.draws)
            self.draws += 1
        assert self.shots is not None
        drawn = torch.multinomial(shares.detach(), self.shots, replacement=True, generator=generator)
        counts = torch.zeros_like(shares).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=shares.dtype))
        return counts / self.shots

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"n_qubits={self.circuit.n_qubits}, n_angles={self.n_angles}, readout={self.readout!r}, shots={self.shots}, "
            f"grad={self.grad!r}"
        )


class _Shifted(torch.autograd.Function):
    """Gradients from measurements at angles that are shifted one at a time."""

    @staticmethod
    def forward(
        ctx: Any, angles: Tensor, measure: Callable[[Tensor], Tensor], shift: float, factor: float, qubits: int
    ) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.rule = measure, shift, factor, qubits
        with torch.no_grad():
            return measure(angles)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (angles,), (measure, shift, factor, qubits) = ctx.saved_tensors, ctx.rule
        batch, count = angles.shape
        found = torch.empty_like(angles)
        together = max(1, _AT_ONCE // (2 * batch << qubits)) if batch else count
        with torch.no_grad():
            for start in range(0, count, together):
                chosen = range(start, min(count, start + together))
                moves = torch.eye(count, device=angles.device, dtype=angles.dtype)[chosen.start : chosen.stop] * shift
                moved = torch.cat([angles + moves[:, None], angles - moves[:, None]]).reshape(-1, count)
                up, down = measure(moved).reshape(2, len(chosen), batch, -1)
                found[:, chosen.start : chosen.stop] = ((up - down) * gradients[0]).sum(-1).T * factor
        return found, None, None, None, None


def _pennylane_probabilities(circuit: Circuit) -> Callable[[Tensor], Tensor]:
    """Probabilities by PennyLane's ``default.qubit``, all samples at once.

    Raises:
        ImportError: it is not installed.
    """
    qml: Any = require_extra("pennylane", "quantum")
    device = qml.device("default.qubit", wires=circuit.n_qubits)

    def shares_of(angles: Tensor) -> Any:
        for gate in circuit.gates:
            if gate[0] == "h":
                qml.Hadamard(gate[1])
            elif gate[0] == "cx":
                qml.CNOT([gate[1], gate[-1]])
            else:
                qml.RY(angles[:, gate[-1]], gate[1])
        return qml.probs(wires=range(circuit.n_qubits))

    node = qml.QNode(shares_of, device, interface="torch", diff_method="backprop")

    def measured(angles: Tensor) -> Tensor:
        shares: Tensor = node(angles)
        return shares.reshape(-1, 2**circuit.n_qubits).expand(len(angles), -1).to(angles)

    return measured
