"""Rank correlation of predicted with measured damage for every scorer: ``python -m benchmarks.scores``."""

from __future__ import annotations

import argparse

from layerwright.recipes.bench import open_bench
from layerwright.recipes.validate import rank_correlations


def main() -> None:
    """Print one line per model and scorer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["demo:lm", "demo:vit", "demo:cnn"])
    parser.add_argument("--samples", type=int, default=32)
    a = parser.parse_args()
    for name in a.models:
        bench = open_bench(name, samples=a.samples, length=128)
        for scorer, value in sorted(rank_correlations(bench).items(), key=lambda item: -item[1]):
            print(f"{name}  {scorer:22s} {value:+.3f}", flush=True)


if __name__ == "__main__":
    main()
