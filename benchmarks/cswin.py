"""Time of attention in cross-shaped windows beside full attention: ``python -m benchmarks.cswin``.

Maps of 56 x 56 positions with 64 channels, the first stage of CSWin-T at 224 pixels; 2 heads, encodings and linear layers
included; no gradients. The arms take turns within a round; the clock counts the time that the process ran, the median of
the rounds counts, and the ratio is the median over the rounds of full attention's time over the arm's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import torch

from layerwright.studies.cswin import forward_times

LEAST = 3.0


def rows_of(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median milliseconds and median ratio to full attention of each arm."""
    return [
        {
            "arm": name,
            "ms": statistics.median(spent),
            "full over arm": statistics.median(full / own for full, own in zip(times["full"], spent, strict=True)),
        }
        for name, spent in times.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--side", type=int, default=56)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of(forward_times((1, 7), given.side, given.rounds))
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        print("| " + " | ".join(rows[0]) + " |\n| --- | ---: | ---: |")
        for row in rows:
            print(f"| {row['arm']} | {row['ms']:.4g} | {row['full over arm']:.3g} |")
    if (ratio := rows[0]["full over arm"]) < LEAST:
        sys.exit(f"stripe width 1: full attention takes {ratio:.2f} times as long, expected at least {LEAST}")


if __name__ == "__main__":
    main()
