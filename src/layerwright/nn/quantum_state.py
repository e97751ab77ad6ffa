"""Whole circuits on batches of real state vectors: few large products, and a backward pass that keeps one state."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layerwright.nn._quantum_plan import Dense, Hadamards, Permuted, Plan, Step, Turns, blocks, kronecker, plan, product
from layerwright.nn.quantum_circuit import Circuit

__all__ = ["circuit_state"]


def _turns(angles: Tensor, turns: Turns) -> tuple[Tensor, Tensor]:
    """Cosines and sines of half the angles of each qubit, ``(batch, qubits)``; no angle is 0."""
    half = angles / 2
    if turns.angles == tuple(range(turns.angles[0], turns.angles[0] + len(turns.angles))):
        half = half[:, turns.angles[0] : turns.angles[-1] + 1]
    else:
        half = torch.stack([half[:, a] if a >= 0 else torch.zeros_like(half[:, 0]) for a in turns.angles], 1)
    return half.cos(), half.sin()


def _matrices(cosine: Tensor, sine: Tensor) -> list[Tensor]:
    """Rotations of each block of qubits as one matrix for each sample, ``(batch, 2 ** size, 2 ** size)``."""
    single = torch.stack([cosine, -sine, sine, cosine], -1).unflatten(-1, (2, 2))
    return [kronecker(single[:, block.start : block.stop]) for block in blocks(cosine.shape[1])]


def _apply_blocks(state: Tensor, matrices: Sequence[Tensor], *, inverse: bool = False) -> Tensor:
    """Apply a matrix to the digits of each block in turn; all are orthogonal. One sample's or one for all."""
    shape, before = state.shape, 1
    for matrix in matrices:
        size = matrix.shape[-1]
        used = matrix.transpose(-1, -2) if inverse else matrix
        if before == 1:
            state = used @ state.reshape(shape[0], size, shape[1] // size)
        elif before * size == shape[1]:
            state = state.reshape(shape[0], before, size) @ used.transpose(-1, -2)
        else:
            used = used[:, None] if used.dim() == 3 else used
            state = used @ state.reshape(shape[0], before, size, shape[1] // (before * size))
        before *= size
    return state.reshape(shape)


def _hadamards(step: Hadamards, like: Tensor, qubits: int) -> list[Tensor]:
    single = torch.eye(2, device=like.device, dtype=like.dtype).repeat(qubits, 1, 1)
    gate = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=like.device, dtype=like.dtype) * math.sqrt(0.5)
    single[list(step.qubits)] = gate
    return [kronecker(single[block.start : block.stop]) for block in blocks(qubits)]


def _unturned(state: Tensor, step: Step, qubits: int, *, inverse: bool) -> Tensor:
    """Apply a step without angles, or undo it."""
    if isinstance(step, Permuted):
        return state.index_select(1, step.back if inverse else step.source)
    if isinstance(step, Dense):
        return state @ (step.matrix.T if inverse else step.matrix)
    assert isinstance(step, Hadamards)
    return _apply_blocks(state, _hadamards(step, state, qubits), inverse=inverse)


def run(angles: Tensor, circuit: Circuit) -> Tensor:
    """State ``(batch, 2 ** qubits)`` behind the circuit for angles ``(batch, n_angles)``."""
    made = plan(circuit, angles.device, angles.dtype)
    state = _forward(angles, made, len(made.steps))
    return state.contiguous() if made.steps else state.clone()


def _forward(angles: Tensor, made: Plan, steps: int) -> Tensor:
    """State behind the first `steps` steps."""
    state = made.start.expand(len(angles), -1)
    for number, step in enumerate(made.steps[:steps]):
        if not isinstance(step, Turns):
            state = _unturned(state, step, made.qubits, inverse=False)
        elif number == 0 and made.factors is not None:
            state = product(_turned_factors(angles, step, made.factors))
        else:
            state = _apply_blocks(state, _matrices(*_turns(angles, step)))
    return state


def _turned_factors(angles: Tensor, step: Turns, factors: Tensor) -> Tensor:
    """Single-qubit states behind the first rotations: ``(batch, qubits, 2)``."""
    (cosine, sine), (low, high) = _turns(angles, step), factors.unbind(1)
    return torch.stack([cosine * low - sine * high, sine * low + cosine * high], -1)


def run_back(angles: Tensor, state: Tensor, gradient: Tensor, circuit: Circuit) -> Tensor:
    """Gradient with respect to the angles, from the last state and the gradient with respect to it.

    Goes through the steps backwards and undoes each on the state and on the gradient. Where the first rotations act on
    a product state, what is behind them is made anew, and only vectors of a block are needed for their slopes.
    """
    made = plan(circuit, angles.device, angles.dtype)
    found = torch.zeros_like(angles)
    layers = [number for number, step in enumerate(made.steps) if isinstance(step, Turns)]
    from_product = bool(layers) and layers[0] == 0 and made.factors is not None
    # At this step and below the state is no longer needed.
    state_until = layers[1] if from_product and len(layers) > 1 else 0
    for number in range(len(made.steps) - 1, -1, -1):
        step = made.steps[number]
        if not isinstance(step, Turns):
            gradient = _unturned(gradient, step, made.qubits, inverse=True)
            state = (
                _unturned(state, step, made.qubits, inverse=True) if number > state_until or not from_product else state
            )
            continue
        if from_product and number == 0:
            assert made.factors is not None
            slopes = _product_slopes(_turned_factors(angles, step, made.factors), gradient)
        else:
            slopes = _slopes(state, gradient, made.qubits)
        used = [qubit for qubit, angle in enumerate(step.angles) if angle >= 0]
        found[:, [step.angles[qubit] for qubit in used]] = slopes[:, used]
        if number == layers[0]:
            break
        matrices = _matrices(*_turns(angles, step))
        gradient = _apply_blocks(gradient, matrices, inverse=True)
        if number > state_until:
            state = _apply_blocks(state, matrices, inverse=True)
    return found


def _product_slopes(factors: Tensor, gradient: Tensor) -> Tensor:
    """`_slopes` for a product of single-qubit states ``(batch, qubits, 2)``."""
    qubits = factors.shape[1]
    if qubits == 1:
        low, high = factors[:, 0].unbind(1)
        return ((gradient[:, 1] * low - gradient[:, 0] * high) / 2)[:, None]
    first, second = factors[:, : qubits // 2], factors[:, qubits // 2 :]
    left, right = product(first), product(second)
    square = gradient.reshape(len(left), left.shape[1], right.shape[1])
    onto_first = (square @ right[:, :, None])[:, :, 0]
    onto_second = (left[:, None, :] @ square)[:, 0]
    return torch.cat([_product_slopes(first, onto_first), _product_slopes(second, onto_second)], 1)


def _slopes(state: Tensor, gradient: Tensor, qubits: int) -> Tensor:
    """``<gradient, J_k state> / 2`` with ``J = [[0, -1], [1, 0]]`` on qubit k: ``(batch, qubits)``.

    A rotation's derivative is ``J / 2`` times the rotated state. The products of the two within a block are one matrix
    for each sample, of which each qubit sums a fixed part.
    """
    found, before = [], 1
    for block in blocks(qubits):
        size = 2 ** len(block)
        shape = (len(state), before, size, 2**qubits // (before * size))
        first, second = gradient.reshape(shape), state.reshape(shape)
        if before > 1:
            first, second = first.transpose(1, 2).flatten(2), second.transpose(1, 2).flatten(2)
        else:
            first, second = first[:, 0], second[:, 0]
        found.append((first @ second.transpose(1, 2)).flatten(1) @ _generators(len(block), state.device, state.dtype))
        before *= size
    return torch.cat(found, 1)


@functools.lru_cache(maxsize=64)
def _generators(qubits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``J / 2`` on each qubit of a block and identity on the others, ``(4 ** qubits, qubits)``."""
    single = torch.eye(2, device="cpu", dtype=torch.float64).repeat(qubits, qubits, 1, 1)
    for qubit in range(qubits):
        single[qubit, qubit] = torch.tensor([[0.0, -0.5], [0.5, 0.0]], dtype=torch.float64, device="cpu")
    return kronecker(single).flatten(1).T.contiguous().to(device, dtype)


@torch.library.custom_op("layerwright::circuit_state", mutates_args=())
def _state_op(angles: Tensor, n_qubits: int, gates: str) -> Tensor:
    return run(angles, _read(n_qubits, gates))


@_state_op.register_fake
def _(angles: Tensor, n_qubits: int, gates: str) -> Tensor:
    return angles.new_empty(angles.shape[0], 2**n_qubits)


@torch.library.custom_op("layerwright::circuit_state_backward", mutates_args=())
def _state_back_op(angles: Tensor, state: Tensor, gradient: Tensor, n_qubits: int, gates: str) -> Tensor:
    return run_back(angles, state, gradient.contiguous(), _read(n_qubits, gates))


@_state_back_op.register_fake
def _(angles: Tensor, state: Tensor, gradient: Tensor, n_qubits: int, gates: str) -> Tensor:
    return torch.empty_like(angles)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.circuit = inputs[1:]  # type: ignore[attr-defined]


def _differentiate(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
    angles, state = ctx.saved_tensors  # type: ignore[attr-defined]
    return _state_back_op(angles, state, gradient, *ctx.circuit), None, None  # type: ignore[attr-defined]


_state_op.register_autograd(_differentiate, setup_context=_keep)


@functools.lru_cache(maxsize=64)
def _read(n_qubits: int, gates: str) -> Circuit:
    read = []
    for text in gates.split(";") if gates else ():
        name, *places = text.split()
        read.append((name, *map(int, places)))
    return Circuit(n_qubits, read)  # type: ignore[arg-type]


def circuit_state(angles: Tensor, circuit: Circuit) -> Tensor:
    """State behind a circuit: ``(batch, n_angles)`` to ``(batch, 2 ** n_qubits)``, differentiable once.

    Rotations of up to five qubits are one matrix for each sample, controlled-nots between rotations one permutation.
    The backward pass undoes the circuit from its last state, which is all that is kept.
    """
    state: Tensor = _state_op(angles, circuit.n_qubits, circuit.text)
    return state
