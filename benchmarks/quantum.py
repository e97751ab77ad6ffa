"""The batched state-vector simulator beside PennyLane's default.qubit with broadcasting: forward, and forward and backward.

    python -m benchmarks.quantum [--qubits 10] [--batch 256] [--circuit real_amplitudes] [--rounds 7]

Needs pennylane. Both compute all probabilities of the same circuit for the same angles in one process, torch tensors
in and out; PennyLane by backpropagation through ``default.qubit``. They take turns; a ratio compares two times of one
round, and the median over the rounds is printed with the extremes. The largest differences of probabilities and
gradients stand beside it. PennyLane simulates in complex128; ours is timed in float32 and in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerwright.nn.quantum_circuit import CIRCUITS, named_circuit
from layerwright.nn.quantum_layer import QuantumLayer


def both(layer: QuantumLayer, angles: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and the gradient with respect to the angles."""
    angles = angles.clone().requires_grad_()
    shares = layer(angles)
    (gradient,) = torch.autograd.grad((shares * weight).sum(), angles)
    return shares.detach(), gradient


@torch.no_grad()
def forward(layer: QuantumLayer, angles: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities alone."""
    return layer(angles), weight


def seconds(fn: Callable[[], Any]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    fn()
    return time.perf_counter() - begun


def compare(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for both passes and both precisions."""
    circuit = named_circuit(a.circuit, a.qubits)
    draw = torch.Generator().manual_seed(0)
    angles = 2 * torch.randn(a.batch, circuit.n_angles, generator=draw, dtype=torch.float64)
    weight = torch.randn(a.batch, 2**a.qubits, generator=draw, dtype=torch.float64)
    mine, theirs = QuantumLayer(circuit), QuantumLayer(circuit, backend="pennylane")
    rows = []
    for dtype in (torch.float32, torch.float64):
        p, g = both(mine, angles.to(dtype), weight.to(dtype))
        their_p, their_g = both(theirs, angles, weight)
        for name, run in (("forward", forward), ("forward + backward", both)):
            times: list[tuple[float, float]] = []
            for number in range(a.rounds + 1):
                pair = (
                    seconds(lambda: run(mine, angles.to(dtype), weight.to(dtype))),  # noqa: B023
                    seconds(lambda: run(theirs, angles, weight)),  # noqa: B023
                )
                if number:  # the first round warms up
                    times.append(pair)
            ratios = [their / own for own, their in times]
            rows.append(
                {
                    "circuit": a.circuit,
                    "qubits": a.qubits,
                    "batch": a.batch,
                    "dtype": str(dtype).removeprefix("torch."),
                    "pass": name,
                    "ours ms": 1e3 * statistics.median(own for own, _ in times),
                    "pennylane ms": 1e3 * statistics.median(their for _, their in times),
                    "ours is faster by": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                    "probabilities differ by": float((p.double() - their_p).abs().max()),
                    "gradients differ by": float((g.double() - their_g).abs().max()),
                }
            )
    return rows


def main() -> None:
    """Time and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--circuit", choices=sorted(CIRCUITS), default="real_amplitudes")
    for name, default in {"qubits": 10, "batch": 256, "rounds": 7, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rows = compare(a)
    if a.json:
        print(json.dumps(rows))
        return
    print(
        f"{'dtype':8} {'pass':19} {'ours ms':>8} {'theirs ms':>10} {'faster':>8}  range          p differs  g differs"
    )
    for row in rows:
        span = f"{row['lowest']:.0f}..{row['highest']:.0f}"
        print(
            f"{row['dtype']:8} {row['pass']:19} {row['ours ms']:8.2f} {row['pennylane ms']:10.1f} "
            f"{row['ours is faster by']:7.1f}x  {span:14} {row['probabilities differ by']:.1e}    {row['gradients differ by']:.1e}"
        )


if __name__ == "__main__":
    main()
