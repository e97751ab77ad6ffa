"""Measure the scores of ``demo:lm`` once, then plan for two budgets. Run: ``python examples/two_budgets.py``."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import layerwright as lw
from layerwright.data import demo_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--scores", type=Path, help="folder of the scores; a temporary one if it is left out")
    a = parser.parse_args()
    model, tokenizer = lw.load("demo:lm")
    calibration = demo_data("demo:lm", tokenizer, samples=a.samples, length=a.length)
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.scores or Path(temporary)
        for budget in ("bits=4", "bits=3"):
            begun = time.perf_counter()
            plan = lw.plan(model, calibration, budget=budget, recipe="rtn", scores=folder)
            seconds = time.perf_counter() - begun
            size, damage = plan.predicted["bytes"], plan.predicted["damage"]
            print(f"{budget}: {size:,.0f} bytes, predicted loss +{damage:.4f}, planned in {seconds:.1f} s")
        for file in sorted(folder.glob("*.json")):
            scores = lw.Scores.load(file)
            print(f"{file.name}: {len(scores.damages)} damages measured in {scores.seconds:.1f} s, used for both plans")


if __name__ == "__main__":
    main()
