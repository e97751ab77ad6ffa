"""The inverse of a FInC unit by wavefront beside the solve pixel by pixel: ``python -m benchmarks.finc [--json]``.

Both invert the same map in turn, in one process; a ratio compares two times of one round, and medians over rounds are
printed. The clock counts the time that this process ran. Beside them stands the floor: the multiply-adds of the inverse
(as many as the convolution has) over the rate of a product of matrices of the wavefront's shape, measured in the same
run, plus the steps times an empty product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from layerwright.nn.invertible_conv import FInCConv

LEAST = 10.0


def measure(size: int, channels: int, batch: int, kernel_size: int = 3, rounds: int = 5) -> dict[str, float]:
    """Milliseconds, steps, ratio and floor for one size."""
    draw = torch.Generator().manual_seed(0)
    conv = FInCConv(channels, kernel_size, generator=draw)
    x = torch.randn(batch, channels, size, size, generator=draw)
    steps: list[int] = []
    with torch.no_grad():
        y = conv(x)[0]
        error = float((conv.inverse(y, on_step=steps.append) - x).abs().max())
        waves, loops = [], []
        for _ in range(rounds):
            waves.append(_milliseconds(lambda: conv.inverse(y), 3))
            loops.append(_milliseconds(lambda: conv.inverse(y, "sequential"), 1))
    macs = batch * size * size * (channels // 4) ** 2 * 4 * kernel_size**2
    floor = _floor(macs, batch, size, channels // 4, kernel_size, len(steps))
    wave = statistics.median(waves)
    return {
        "size": size,
        "channels": channels,
        "batch": batch,
        "steps": len(steps),
        "wavefront ms": wave,
        "sequential ms": statistics.median(loops),
        "ratio": statistics.median(b / a for a, b in zip(waves, loops, strict=True)),
        "floor ms": floor,
        "times the floor": wave / floor,
        "largest error": error,
    }


def _floor(macs: int, batch: int, size: int, channels: int, k: int, steps: int) -> float:
    """Multiply-adds over the measured rate of products of the wavefront's shape, and what the calls alone take."""
    rows = max(1, batch * size * size // (2 * size - 1))
    left, right = torch.randn(4, rows, k * channels), torch.randn(4, k * channels, channels)
    out = torch.zeros(4, rows, channels)
    product = _milliseconds(lambda: out.baddbmm_(left, right), 50)
    small = [torch.zeros(4, 1, 1) for _ in range(3)]
    call = _milliseconds(lambda: small[0].baddbmm_(small[1], small[2]), 50)
    rate = 4 * rows * k * channels * channels / max(product - call, 1e-6)
    return macs / rate + steps * k * call


def _milliseconds(run: Callable[[], Tensor], repeats: int) -> float:
    run()
    begun = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - begun) * 1e3 / repeats


def main() -> None:
    """Print the table and whether the wavefront is fast enough."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(size, 48, 16, rounds=given.rounds) for size in (16, 32, 64)]
    for row in rows:
        expected = 2 * int(row["size"]) - 1
        if row["steps"] != expected:
            sys.exit(f"{row['size']}: {row['steps']} steps, expected {expected}")
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        print("| " + " | ".join(rows[0]) + " |\n|" + " ---: |" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")
    if rows[1]["ratio"] < LEAST:
        sys.exit(f"32 x 32: {rows[1]['ratio']:.1f} times as fast as pixel by pixel, expected at least {LEAST:g}")


if __name__ == "__main__":
    main()
