"""Center-pivot against full kernels of Hough matching: ``python -m benchmarks.chm [--json]``.

All vote on the same correlation in turn, in one process, without gradients; a ratio compares two times of one round, and
medians over rounds are printed. The clock counts the time that this process ran. The full kernel is measured twice: as
the layer does it, and as a sum over the first offset of 3-D convolutions of one channel, as it was published (in 6-D
without the sums over scales that follow). Beside them stand the multiply-adds and the floor: multiply-adds over the rate
of a large product of matrices, measured in the same run. The difference to a full layer without the other entries is
checked first. The network votes in 6-D on 15 x 15 cells and in 4-D on 30 x 30; a 4-D layer on 15 x 15 is shown beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from layerwright.nn.hough_matching import CHM4d, CHM6d

LEAST = 3.0
PUBLISHED = ((3, 15), (1, 30))
"""Scales and sides at which the published network votes, where center-pivot must be `LEAST` times as fast."""


def measure(scales: int, side: int = 15, kernel_size: int = 5, rounds: int = 5) -> dict[str, Any]:
    """Milliseconds, ratios, multiply-adds and floors of a 4-D layer (`scales` = 1) or of a 6-D layer."""
    draw = torch.Generator().manual_seed(0)
    shape = (1, 1, *((scales, scales) if scales > 1 else ()), *(side,) * 4)
    corr = torch.rand(shape, generator=draw)
    full, pivot = (_layer(scales, kernel_size, "psi", cut) for cut in (False, True))
    same = _layer(scales, kernel_size, "full", False)
    with torch.no_grad():
        same.kernel.weight.copy_(pivot.dense_kernel().flatten())
        gap = float((pivot(corr) - same(corr)).abs().max())
        runs = [partial(layer, corr) for layer in (full, partial(_published, full), pivot)]
        times = [[_milliseconds(run) for run in runs] for _ in range(rounds)]
    macs, few = (scales**4 * side**4 * taps for taps in (kernel_size**4, 2 * kernel_size**2))
    slow, published, fast = (statistics.median(column) for column in zip(*times, strict=True))
    rate = _rate()
    return {
        "layer": f"{'4-D' if scales == 1 else '6-D'}, s = {side}",
        "full ms": slow,
        "full by conv3d ms": published,
        "center-pivot ms": fast,
        "ratio": statistics.median(a / c for a, _, c in times),
        "ratio to conv3d": statistics.median(b / c for _, b, c in times),
        "full MACs (M)": macs / 1e6,
        "center-pivot MACs (M)": few / 1e6,
        "full floor ms": macs / rate,
        "center-pivot floor ms": few / rate,
        "largest difference": gap,
    }


def _published(layer: Any, corr: Tensor) -> Tensor:
    """Pairs of scales as a batch, scale offsets of the kernel as output channels, one 3-D convolution an offset."""
    *_, height, width, more, last = corr.shape
    kernel = layer.dense_kernel()
    side = kernel.shape[-1]
    kernel = kernel.view(-1, 1, *(side,) * 4)
    corr = functional.pad(corr.view(-1, 1, height, width, more, last), (0, 0) * 3 + (side // 2,) * 2)
    rows = [corr[:, :, place : place + height].transpose(1, 2).flatten(0, 1) for place in range(side)]
    moved = [functional.conv3d(row, kernel[:, :, place], padding=side // 2) for place, row in enumerate(rows)]
    return torch.stack(moved).sum(0)


def _layer(scales: int, kernel_size: int, kind: Any, center_pivot: bool) -> Any:
    draw = torch.Generator().manual_seed(1)
    if scales == 1:
        return CHM4d(kernel_size, kind, center_pivot, generator=draw)
    return CHM6d(3, kernel_size, kind, center_pivot, generator=draw)


def _rate() -> float:
    """Multiply-adds a millisecond of a product of matrices of 512 x 512."""
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    return 512**3 / min(_milliseconds(lambda: left @ right) for _ in range(9))


def _milliseconds(run: Callable[[], Tensor]) -> float:
    run()
    begun = time.process_time()
    run()
    return (time.process_time() - begun) * 1e3


def main() -> None:
    """Print the table and whether center-pivot is fast enough."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(scales, side, rounds=given.rounds) for scales, side in (*PUBLISHED, (1, 15))]
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        print("| " + " | ".join(rows[0]) + " |\n|" + " ---: |" * len(rows[0]))
        for row in rows:
            cells = (value if isinstance(value, str) else f"{value:.4g}" for value in row.values())
            print("| " + " | ".join(cells) + " |")
    for row in rows:
        if row["largest difference"] > 1e-4:
            sys.exit(f"{row['layer']}: center-pivot differs by {row['largest difference']:.1e} from its full kernel")
    slow = [f"{row['layer']}: {row['ratio']:.1f}" for row in rows[: len(PUBLISHED)] if row["ratio"] < LEAST]
    if slow:
        sys.exit(f"center-pivot is less than {LEAST:g} times as fast: {'; '.join(slow)}")


if __name__ == "__main__":
    main()
