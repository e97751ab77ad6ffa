"""The transducer loss against loops over the cells of its lattice, forward and backward.

    python -m benchmarks.transducer [--batch 8] [--frames 100] [--labels 20] [--symbols 30] [--rounds 5] [--json]

All take turns; a ratio compares two times of one round, and the median over rounds is printed. `one cell at a time` walks
through the lattice of one sample after the other, `one cell, whole batch` through all samples at once, and
`anti-diagonals, autograd` is the same recursion as ours without the gradient written out. The last column is the highest
number of bytes that a call held at once, in units of the logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwright.nn.transducer_loss import transducer_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles.transducer import loop_loss, loop_loss_batched

OURS = "ours"
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def diagonal_autograd(logits: Tensor, targets: Tensor, frame_lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """Losses ``(batch,)`` by anti-diagonals with a log-softmax over all symbols; the gradient is autograd's."""
    logs = logits.log_softmax(-1)
    blank = logs[..., 0]
    label = logs[:, :, :-1].gather(-1, targets[:, None, :, None].expand(-1, logits.shape[1], -1, 1))[..., 0]
    frames, prefixes = blank.shape[1:]
    low = torch.finfo(logs.dtype).min / 4
    alpha = F.pad(logs.new_zeros(len(logits), 1), (0, prefixes - 1), value=low)
    u = torch.arange(prefixes)
    found = [alpha]
    for d in range(1, frames + prefixes - 1):
        down, along = d - 1 - u, d - u[1:]
        stay = alpha + torch.where((down >= 0) & (down < frames), blank[:, down.clamp(0, frames - 1), u], low)
        step = alpha[:, :-1] + torch.where(
            (along >= 0) & (along < frames), label[:, along.clamp(0, frames - 1), u[:-1]], low
        )
        alpha = torch.logaddexp(stay, F.pad(step, (1, 0), value=low)).clamp(min=low)
        found.append(alpha)
    rows = torch.arange(len(logits))
    last = frame_lengths - 1
    return -(torch.stack(found)[last + target_lengths, rows, target_lengths] + blank[rows, last, target_lengths])


def ours(logits: Tensor, targets: Tensor, frame_lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """Losses ``(batch,)``."""
    return transducer_loss(logits, targets, frame_lengths, target_lengths, reduction="none")


LOSSES: dict[str, Callable[..., Tensor]] = {
    OURS: ours,
    "anti-diagonals, autograd": diagonal_autograd,
    "one cell, whole batch": loop_loss_batched,
    "one cell at a time": loop_loss,
}


def make_batch(batch: int, frames: int, labels: int, symbols: int) -> Batch:
    """Random logits with `symbols` labels and blank, and labels; all samples of full length."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, frames, labels + 1, symbols + 1, generator=generator)
    targets = torch.randint(1, symbols + 1, (batch, labels), generator=generator)
    return logits, targets, torch.full((batch,), frames), torch.full((batch,), labels)


def seconds(loss: Callable[..., Tensor], batch: Batch) -> tuple[float, Tensor]:
    """Time of one loss with its gradient, and the gradient."""
    logits = batch[0].clone().requires_grad_()
    begun = time.perf_counter()
    loss(logits, *batch[1:]).sum().backward()
    taken = time.perf_counter() - begun
    assert logits.grad is not None
    return taken, logits.grad


def peak_bytes(loss: Callable[..., Tensor], batch: Batch) -> int:
    """Highest number of bytes that a call, with its gradient, held at once beside the logits."""
    from torch.profiler import ProfilerActivity, profile

    logits = batch[0].clone().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss(logits, *batch[1:]).sum().backward()
    held = highest = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def measure(batch: Batch, rounds: int, names: tuple[str, ...] = tuple(LOSSES)) -> list[dict[str, Any]]:
    """A row for each loss: median milliseconds, and median, lowest and highest ratio to ours."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        gradients = {}
        for name in names:
            taken, gradients[name] = seconds(LOSSES[name], batch)
            if number:  # the first round warms up
                times[name].append(taken)
        for name, gradient in gradients.items():
            if not torch.allclose(gradient, gradients[OURS], atol=1e-3):
                raise AssertionError(f"{name}: another gradient than ours")
    rows = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times[OURS], strict=True)]
        rows.append(
            {
                "loss": name,
                "ms": 1000 * statistics.median(own),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("batch", 8), ("frames", 100), ("labels", 20), ("symbols", 30), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch = make_batch(arguments.batch, arguments.frames, arguments.labels, arguments.symbols)
    rows = measure(batch, arguments.rounds)
    for row in rows:
        row["peak"] = peak_bytes(LOSSES[row["loss"]], batch) / batch[0].nbytes
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'':<26} {'ms':>9} {'ours is':>9}  {'range':<16} {'peak':>6}")
    for row in rows:
        spread = f"{row['lowest']:.1f}..{row['highest']:.1f}"
        print(f"{row['loss']:<26} {row['ms']:9.2f} {row['ratio']:8.1f}x  {spread:<16} {row['peak']:5.1f}x")


if __name__ == "__main__":
    main()
