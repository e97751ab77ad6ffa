from __future__ import annotations

import math

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.nn.quantum_circuit import (
    CIRCUITS,
    Circuit,
    bell_circuit,
    named_circuit,
    real_amplitudes_circuit,
    ry_circuit,
)
from layerwright.nn.quantum_gates import (
    apply_cx,
    apply_h,
    apply_ry,
    expval_z,
    ground_state,
    meyer_wallach,
    probabilities,
)
from layerwright.nn.quantum_state import circuit_state
from oracles import quantum as oracle

MIXED = [("ry", 0, 0), ("h", 1), ("ry", 1, 1), ("cx", 0, 2), ("h", 2), ("h", 2), ("ry", 0, 2), ("cx", 2, 1)]
ALL = [
    ry_circuit(1),
    ry_circuit(4),
    bell_circuit(1),
    bell_circuit(4),
    bell_circuit(8),
    real_amplitudes_circuit(4),
    real_amplitudes_circuit(4, 1, "as_released_groups"),
    real_amplitudes_circuit(3, 3),
    real_amplitudes_circuit(6, 2),
    real_amplitudes_circuit(8, 0),
    Circuit(3, MIXED),
    Circuit(7, [*MIXED, ("ry", 6, 3), ("h", 5), ("ry", 3, 4)]),
    Circuit(3, [("h", 0), ("cx", 0, 1), ("cx", 1, 2), ("ry", 1, 0)]),  # an entangled start
    Circuit(2, [("h", 0), ("cx", 0, 1)]),
]


def random_states(batch: int, qubits: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(batch, 2**qubits, generator=draw, dtype=torch.float64), dim=1)


def random_angles(circuit: Circuit, batch: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return 3 * torch.randn(batch, circuit.n_angles, generator=draw, dtype=torch.float64).to(dtype)


def by_gates(angles: torch.Tensor, circuit: Circuit) -> torch.Tensor:
    state = ground_state(len(angles), circuit.n_qubits, angles.dtype)
    for gate in circuit.gates:
        if gate[0] == "h":
            state = apply_h(state, gate[1])
        elif gate[0] == "ry":
            state = apply_ry(state, angles[:, gate[-1]], gate[1])
        else:
            state = apply_cx(state, gate[1], gate[-1])
    return state


def test_gates_are_their_matrices() -> None:
    state, theta = random_states(6, 3), torch.linspace(-4, 4, 6, dtype=torch.float64)
    for qubit in range(3):
        by_matrix = state @ oracle.on_qubits(3, {qubit: oracle.H}).T
        torch.testing.assert_close(apply_h(state, qubit), by_matrix)
        rows = [oracle.on_qubits(3, {qubit: oracle.ry(t)}) @ row for t, row in zip(theta.tolist(), state, strict=True)]
        torch.testing.assert_close(apply_ry(state, theta, qubit), torch.stack(rows))
        torch.testing.assert_close(apply_ry(state, 0.3, qubit), state @ oracle.on_qubits(3, {qubit: oracle.ry(0.3)}).T)
        for target in {0, 1, 2} - {qubit}:
            matrix = oracle.unitary(3, [("cx", qubit, target)], [])
            flipped = apply_cx(state, qubit, target)
            torch.testing.assert_close(flipped, state @ matrix.T)
            assert torch.equal(apply_cx(flipped, qubit, target), state)


def test_digits_are_read_from_the_left() -> None:
    state = apply_ry(ground_state(1, 3), math.pi, 0)  # |100>
    assert probabilities(state)[0].argmax() == 4
    assert expval_z(state)[0].tolist() == pytest.approx([-1, 1, 1], abs=1e-6)


@pytest.mark.parametrize("circuit", ALL, ids=lambda c: f"{c.n_qubits}q{len(c.gates)}g")
def test_whole_circuits_are_products_of_matrices(circuit: Circuit) -> None:
    angles = random_angles(circuit)
    state = circuit_state(angles, circuit)
    torch.testing.assert_close(state, oracle.states(circuit.n_qubits, circuit.gates, angles), atol=1e-12, rtol=0)
    torch.testing.assert_close(by_gates(angles, circuit), state, atol=1e-12, rtol=0)
    torch.testing.assert_close(state.norm(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(circuit_state(angles[2:3], circuit), state[2:3])
    turned = probabilities(circuit_state(angles + 2 * math.pi, circuit))
    torch.testing.assert_close(turned, probabilities(state), atol=1e-12, rtol=0)
    single = circuit_state(angles.float(), circuit)
    torch.testing.assert_close(single.double(), state, atol=2e-6, rtol=0)


@pytest.mark.parametrize("circuit", [c for c in ALL if c.n_angles], ids=lambda c: f"{c.n_qubits}q{len(c.gates)}g")
def test_the_backward_pass_is_that_of_the_gates(circuit: Circuit) -> None:
    angles = random_angles(circuit).requires_grad_()
    weight = random_states(5, circuit.n_qubits, 2)
    (fast,) = torch.autograd.grad((circuit_state(angles, circuit) * weight).sum(), angles)
    (slow,) = torch.autograd.grad((by_gates(angles, circuit) * weight).sum(), angles)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)


def test_many_qubits_and_three_blocks() -> None:
    circuit = real_amplitudes_circuit(11)
    angles = random_angles(circuit, 2).requires_grad_()
    state, slow = circuit_state(angles, circuit), by_gates(angles, circuit)
    torch.testing.assert_close(state, slow, atol=1e-12, rtol=0)
    weight = random_states(2, 11, 3)
    fast_gradient, slow_gradient = (torch.autograd.grad((s * weight).sum(), angles)[0] for s in (state, slow))
    torch.testing.assert_close(fast_gradient, slow_gradient, atol=1e-12, rtol=0)


def test_what_is_published_of_the_circuits() -> None:
    theta = random_angles(ry_circuit(4))
    p = probabilities(circuit_state(theta, ry_circuit(4)))
    for state in range(16):
        digits = [state >> 3 & 1, state >> 2 & 1, state >> 1 & 1, state & 1]
        product = torch.ones(5, dtype=torch.float64)
        for qubit, digit in enumerate(digits):
            product = product * (1 + (1 if digit else -1) * theta[:, qubit].sin()) / 2
        torch.testing.assert_close(p[:, state], product)
    still = probabilities(circuit_state(torch.zeros(1, 4), bell_circuit(4)))
    torch.testing.assert_close(still, torch.eye(16)[:1])
    assert real_amplitudes_circuit(4).n_angles == 8 and bell_circuit(4).n_angles == ry_circuit(4).n_angles == 4
    pairs = [gate[1:] for gate in real_amplitudes_circuit(4).gates if gate[0] == "cx"]
    assert pairs == [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2)]
    # The doubled gate of the released groups cancels.
    single = Circuit(4, [g for g in real_amplitudes_circuit(4, 1, "as_released_groups").gates if g != ("cx", 1, 2)])
    theta = random_angles(single)
    torch.testing.assert_close(
        circuit_state(theta, single), circuit_state(theta, real_amplitudes_circuit(4, 1, "as_released_groups"))
    )
    assert [named_circuit(name) for name in CIRCUITS] == [bell_circuit(), real_amplitudes_circuit(), ry_circuit()]


def test_entanglement() -> None:
    state = random_states(4, 3)
    torch.testing.assert_close(
        meyer_wallach(state), torch.tensor([oracle.meyer_wallach(row) for row in state], dtype=torch.float64)
    )
    assert float(meyer_wallach(circuit_state(random_angles(ry_circuit(4)), ry_circuit(4))).abs().max()) < 1e-12
    bell = circuit_state(torch.zeros(1, 0), Circuit(2, [("h", 0), ("cx", 0, 1)]))
    assert float(meyer_wallach(bell)) == pytest.approx(1)
    for circuit in (bell_circuit(4), real_amplitudes_circuit(4)):
        assert float(meyer_wallach(circuit_state(random_angles(circuit, 50), circuit)).mean()) > 0.2


def test_bad_input() -> None:
    state = ground_state(2, 3)
    with pytest.raises(InputError, match="qubits: got 17, expected 1 to 16"):
        ground_state(1, 17)
    with pytest.raises(InputError, match="qubit: got 3, expected 0 to 2"):
        apply_h(state, 3)
    with pytest.raises(InputError, match="got 1 for both"):
        apply_cx(state, 1, 1)
    with pytest.raises(InputError, match=r"state: got shape \(2, 6\)"):
        apply_h(torch.zeros(2, 6), 0)
    with pytest.raises(TypeError, match=r"state: got torch.complex64"):
        apply_h(state.to(torch.complex64), 0)
    with pytest.raises(TypeError, match="theta"):
        apply_ry(state, torch.tensor([1, 2]), 0)
    for qubits, gates, message in (
        (0, [], "n_qubits: got 0, expected 1 to 16"),
        (17, [], "n_qubits"),
        (2, [("x", 0)], "unknown gate 'x'"),
        (2, [("h", 2)], "does not fit 2 qubits"),
        (2, [("h", 0, 1)], "does not fit"),
        (2, [("cx", 1, 1)], "controls itself"),
        (2, [("ry", 0, 0), ("ry", 1, 0)], r"angles \[0, 0\] enter"),
        (2, [("ry", 0, 1)], "angles"),
    ):
        with pytest.raises(InputError, match=message):
            Circuit(qubits, gates)  # type: ignore[arg-type]
    for build, message in (
        (lambda: bell_circuit(0), "n_qubits: got 0"),
        (lambda: ry_circuit(20), "n_qubits: got 20"),
        (lambda: real_amplitudes_circuit(4, -1), "reps"),
        (lambda: real_amplitudes_circuit(5, 1, "as_released_groups"), "for 4 qubits, got 5"),
        (lambda: real_amplitudes_circuit(4, 1, "ring"), "unknown entangler"),  # type: ignore[arg-type]
        (lambda: named_circuit("bel"), "did you mean bell"),
    ):
        with pytest.raises(InputError, match=message):
            build()
