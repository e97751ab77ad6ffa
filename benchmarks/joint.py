"""Joint treatments against each single kind on ``demo:lm``, at the same sizes: ``python -m benchmarks.joint``.

Every kind is planned from the same scores by the same integer program; the joint choice is settled by measuring on
calibration data, as the recipe does it. Losses are measured on held-out text.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from layerwright.allocate import ALLOCATORS
from layerwright.core.budget import Budget
from layerwright.core.errors import BudgetError
from layerwright.core.treatment import treatments_from_data
from layerwright.recipes.bench import open_bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import decide
from layerwright.recipes.table import limits_of
from layerwright.treat.apply import apply_plan

SPARSE = tuple(treatments_from_data({"sparsify": {"sparsity": s}}) for s in (0.5, 0.7, 0.8, 0.85, 0.9, 0.95))
RANKS = tuple(treatments_from_data({"low_rank": {"inner": r}}) for r in (4, 8, 16, 24, 32, 48))


def kind_of(tags: tuple[str, ...]) -> str:
    """`quantize`, `sparsify`, `low_rank`, `drop`, or `mixed`."""
    return tags[0] if len(set(tags)) == 1 else "mixed"


def main() -> None:
    """Measure all kinds at all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25, 0.15])
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    bench = open_bench("demo:lm")
    joint = recipe("joint")
    wide = dataclasses.replace(joint, candidates=tuple(dict.fromkeys(joint.candidates + SPARSE + RANKS)))
    with tempfile.TemporaryDirectory() as folder:
        unsettled = dataclasses.replace(wide, measured_choice=False)
        decision = decide(bench, "size=0.9x", unsettled, seed=a.seed, scores_folder=Path(folder))
        joined = {
            size: decide(bench, f"size={size}x", joint, seed=a.seed, scores_folder=Path(folder)) for size in a.sizes
        }
    base = bench.heldout.mean_loss(bench.model)
    print(f"untouched: {base:.4f} nats/byte")
    for size in a.sizes:
        for kind in ("joint", "quantize", "sparsify", "low_rank", "drop"):
            options = [
                o
                for o in decision.table.options
                if not o.treatments or kind == "joint" or all(t.tag == kind for t in o.treatments)
            ]
            table = dataclasses.replace(decision.table, options=tuple(options))
            limits = limits_of(Budget.parse(f"size={size}x"), table, decision.refs, -1, 2)
            try:
                allocation = (
                    joined[size].allocation
                    if kind == "joint"
                    else ALLOCATORS.get("integer")(table, limits, seed=a.seed)
                )
            except BudgetError as error:
                print(f"size={size}x  {kind:9s} cannot: {error}")
                continue
            plan = {o.layer if len(o.covers) > 1 else o.covers[0]: o.treatments for o in allocation.chosen}
            treated, _ = apply_plan(bench.model, plan, bench.calibration, simulate=True)
            loss = bench.heldout.mean_loss(treated)
            if kind == "joint":
                print(f"size={size}x  {joined[size].plan.notes}")
            print(
                f"size={size}x  {kind:9s} predicted +{allocation.damage:.4f}  measured +{loss - base:.4f} nats/byte"
                f"  {allocation.cost.bytes:,.0f} bytes",
                flush=True,
            )


if __name__ == "__main__":
    main()
