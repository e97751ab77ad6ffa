from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
from torch import nn

from layerwright.core.errors import InputError, MissingExtraError
from layerwright.nn import quantum_layer
from layerwright.nn.quantum_circuit import CIRCUITS, bell_circuit, real_amplitudes_circuit, ry_circuit
from layerwright.nn.quantum_layer import QuantumLayer
from oracles import quantum as oracle


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def gradient(layer: QuantumLayer, angles: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    angles = angles.clone().requires_grad_()
    (layer(angles) * weight).sum().backward()
    assert angles.grad is not None
    return angles.grad


@pytest.mark.parametrize("name", sorted(CIRCUITS))
def test_outputs_are_measurements(name: str) -> None:
    layer = QuantumLayer(name)
    angles = torch.randn(6, layer.n_angles, dtype=torch.float64)
    p = layer(angles)
    torch.testing.assert_close(p, oracle.states(4, layer.circuit.gates, angles).square(), atol=1e-12, rtol=0)
    torch.testing.assert_close(p.sum(1), torch.ones(6, dtype=torch.float64))
    expected = QuantumLayer(name, "expval")(angles)
    for qubit in range(4):
        z = torch.diagonal(oracle.on_qubits(4, {qubit: oracle.ZERO - oracle.ONE}))
        torch.testing.assert_close(expected[:, qubit], p @ z)
    assert layer.n_outputs == 16 and QuantumLayer(name, "expval").n_outputs == 4
    assert layer(angles.reshape(2, 3, -1)).shape == (2, 3, 16)
    assert layer(angles[:0]).shape == (0, 16)
    assert not list(layer.parameters()) and not layer.state_dict()


@pytest.mark.parametrize("name", sorted(CIRCUITS))
@pytest.mark.parametrize("readout", ["probs", "expval"])
def test_rules_for_the_gradient(name: str, readout: Any) -> None:
    layer = QuantumLayer(name, readout)
    angles = torch.randn(3, layer.n_angles, dtype=torch.float64)
    weight = torch.randn(3, layer.n_outputs, dtype=torch.float64)
    exact = gradient(layer, angles, weight)
    shifted = gradient(QuantumLayer(name, readout, grad="parameter_shift"), angles, weight)
    torch.testing.assert_close(shifted, exact, atol=1e-6, rtol=0)
    released = gradient(QuantumLayer(name, readout, grad="released"), angles, weight)
    torch.testing.assert_close(released, math.sqrt(2) * exact, atol=1e-6, rtol=0)
    assert torch.autograd.gradcheck(layer, angles.clone().requires_grad_())


def test_shifted_circuits_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantumLayer(real_amplitudes_circuit(3), grad="parameter_shift")
    angles, weight = torch.randn(5, 6), torch.randn(5, 8)
    whole = gradient(layer, angles, weight)
    monkeypatch.setattr(quantum_layer, "_AT_ONCE", 5 * 8 * 2 * 4)
    torch.testing.assert_close(gradient(layer, angles, weight), whole)


def test_shots_come_near_as_their_root() -> None:
    angles = torch.randn(200, 8)
    exact = QuantumLayer()(angles)
    errors = []
    for shots in (100, 6400):
        layer = QuantumLayer(shots=shots, grad="parameter_shift", seed=1)
        counted = layer(angles)
        torch.testing.assert_close(counted * shots, (counted * shots).round(), atol=1e-3, rtol=0)
        torch.testing.assert_close(counted.sum(1), torch.ones(200))
        errors.append(float((counted - exact).square().mean().sqrt()))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)
    by_theory = float((exact * (1 - exact)).mean().sqrt()) / 10
    assert errors[0] == pytest.approx(by_theory, rel=0.1)


def test_shots_repeat_by_seed_and_differ_by_call() -> None:
    angles = torch.randn(3, 4)
    first, second = (QuantumLayer("bell", shots=50, grad="released", seed=5) for _ in range(2))
    a, b = first(angles), first(angles)
    assert not torch.equal(a, b)
    assert torch.equal(a, second(angles)) and torch.equal(b, copy.deepcopy(second)(angles))
    state = torch.get_rng_state()
    first(angles)
    assert torch.equal(state, torch.get_rng_state())
    noisy = gradient(
        QuantumLayer("bell", shots=20_000, grad="parameter_shift", seed=1), angles, torch.ones(3, 16).tril()
    )
    exact = gradient(QuantumLayer("bell"), angles, torch.ones(3, 16).tril())
    torch.testing.assert_close(noisy, exact, atol=0.05, rtol=0)


def test_depolarising_mixes() -> None:
    angles = torch.randn(4, 4)
    p, mixed = QuantumLayer("ry")(angles), QuantumLayer("ry", depolarising=0.25)(angles)
    torch.testing.assert_close(mixed, 0.75 * p + 0.25 / 16)
    assert torch.allclose(QuantumLayer("ry", "expval", depolarising=1.0)(angles), torch.zeros(4, 4), atol=1e-6)


@pytest.mark.parametrize("grad", ["backprop", "parameter_shift"])
def test_bfloat16_in_a_network(grad: Any) -> None:
    network = nn.Sequential(nn.Linear(5, 8), QuantumLayer(grad=grad), nn.Linear(16, 2)).bfloat16()
    x = torch.randn(7, 5).bfloat16()
    out = network(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    weights = network[0].weight.grad
    assert weights is not None and weights.dtype == torch.bfloat16 and float(weights.abs().sum()) > 0
    angles = network[0](x)
    torch.testing.assert_close(network[1](angles).float(), QuantumLayer()(angles.float()), atol=4e-3, rtol=0.01)


def test_compiles_whole() -> None:
    layer, angles = QuantumLayer(bell_circuit(3)), torch.randn(4, 3, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(angles), layer(angles))
    torch.library.opcheck(
        torch.ops.layerwright.circuit_state.default,
        (angles, 3, "h 0;ry 0 0;cx 1 0;ry 1 1;ry 2 2"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_pennylane_gives_the_same() -> None:
    pytest.importorskip("pennylane")
    for circuit in (
        ry_circuit(3),
        bell_circuit(4),
        real_amplitudes_circuit(4),
        real_amplitudes_circuit(4, 1, "as_released_groups"),
        real_amplitudes_circuit(6, 2),
    ):
        for readout in ("probs", "expval"):
            mine = QuantumLayer(circuit, readout)  # type: ignore[arg-type]
            theirs = QuantumLayer(circuit, readout, backend="pennylane")  # type: ignore[arg-type]
            angles = 3 * torch.randn(6, circuit.n_angles, dtype=torch.float64)
            weight = torch.randn(6, mine.n_outputs, dtype=torch.float64)
            torch.testing.assert_close(theirs(angles), mine(angles), atol=1e-6, rtol=0)
            torch.testing.assert_close(
                gradient(theirs, angles, weight), gradient(mine, angles, weight), atol=1e-6, rtol=0
            )


def test_without_pennylane_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pennylane", None)
    with pytest.raises(MissingExtraError, match=r"layerwright\[quantum\]"):
        QuantumLayer(backend="pennylane")


def test_bad_input() -> None:
    for arguments, message in (
        ({"circuit": "ring"}, "unknown circuit 'ring'"),
        ({"readout": "counts"}, "unknown readout"),
        ({"grad": "adjoint"}, "unknown grad"),
        ({"backend": "qiskit"}, "unknown backend"),
        ({"shots": 0, "grad": "released"}, "shots: got 0"),
        ({"shots": 10}, "grad: 'backprop' does not go through shots"),
        ({"depolarising": 1.5}, "depolarising"),
    ):
        with pytest.raises(InputError, match=message):
            QuantumLayer(**arguments)  # type: ignore[arg-type]
    layer = QuantumLayer()
    with pytest.raises(InputError, match="angles: got 4, expected 8"):
        layer(torch.zeros(2, 4))
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="angles: got torch"):
            layer(torch.zeros(2, 8, dtype=dtype))
