"""Joint treatments against each single kind on ``demo:lm``, at the same budgets: ``python -m benchmarks.joint``.

Every kind is planned from the same scores by the same integer program; the joint choice is settled by measuring on
calibration data, as the recipe does it. A budget on the cache gives every kind the same rows of cache budgets. Seeds
draw other calibration windows; losses are measured on the same held-out text.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections import Counter
from pathlib import Path

from layerwright.allocate import ALLOCATORS
from layerwright.core.budget import Budget
from layerwright.core.errors import BudgetError
from layerwright.core.option import Allocation
from layerwright.core.treatment import treatments_from_data
from layerwright.recipes.bench import open_bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import Decision, decide, element_bytes
from layerwright.recipes.table import limits_of
from layerwright.studies._fixtures import byte_windows
from layerwright.treat.apply import apply_plan

SPARSE = tuple(treatments_from_data({"sparsify": {"sparsity": s}}) for s in (0.5, 0.7, 0.8, 0.85, 0.9, 0.95))
RANKS = tuple(treatments_from_data({"low_rank": {"inner": r}}) for r in (4, 8, 16, 24, 32, 48))


NARROW = tuple(treatments_from_data({"narrow": {"share": s}}) for s in (0.1, 0.25, 0.5, 0.75))
KINDS = ("quantize", "sparsify", "low_rank", "narrow", "drop")
WEIGHTLESS = ("kv",)


def main() -> None:
    """Measure all kinds under all budgets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", nargs="+", default=["size=0.25x", "size=0.2x", "size=0.2x,kv=0.5x", "size=0.15x"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of 256 bytes")
    a = parser.parse_args()
    for budget in a.budgets:
        rows = [measured(budget, seed, a.samples) for seed in range(a.seeds)]
        for kind in rows[0]:
            rises = [row[kind] for row in rows if kind in row]
            best = min(
                statistics.fmean(row[other] for row in rows) for other in KINDS if all(other in row for row in rows)
            )
            if rises:
                mean = statistics.fmean(rises)
                each = " ".join(f"{rise:+.4f}" for rise in rises)
                print(
                    f"{budget:20s} {kind:9s} mean {mean:+.4f} nats/byte ({each}); best single kind {best:+.4f}",
                    flush=True,
                )


def measured(budget: str, seed: int, samples: int) -> dict[str, float]:
    """Rise of the held-out loss by kind, under one budget."""
    bench = open_bench("demo:lm")
    windows = byte_windows("calibration", bench.processor, samples, 256, seed=seed)
    bench = dataclasses.replace(bench, calibration=windows)
    base = bench.heldout.mean_loss(bench.model)
    joint = recipe("joint")
    wide = dataclasses.replace(
        joint, candidates=tuple(dict.fromkeys(joint.candidates + SPARSE + RANKS + NARROW)), measured_choice=False
    )
    limits = Budget.parse(budget)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        decision = decide(bench, _loosest(limits), wide, seed=seed, scores_folder=Path(folder))
        settled = decide(bench, budget, joint, seed=seed, scores_folder=Path(folder))
    width = element_bytes(bench, decision.refs)
    for kind in ("joint", *KINDS):
        try:
            allocation = settled.allocation if kind == "joint" else _alone(kind, decision, limits, width, seed)
        except BudgetError as error:
            print(f"{budget}  seed {seed}  {kind:9s} cannot: {error}", flush=True)
            continue
        plan = {o.layer if len(o.covers) > 1 else o.covers[0]: o.treatments for o in allocation.chosen}
        treated, _ = apply_plan(bench.model, plan, bench.calibration, simulate=True)
        found[kind] = bench.heldout.mean_loss(treated) - base
        took = Counter(t.tag for o in allocation.chosen for t in o.treatments)
        print(
            f"{budget}  seed {seed}  {kind:9s} predicted {allocation.damage:+.4f}  measured {found[kind]:+.4f} nats/byte  "
            f"{allocation.cost.bytes:,.0f} bytes  {dict(took)}",
            flush=True,
        )
    return found


def _loosest(limits: Budget) -> str:
    """A budget that all kinds can meet, on the same resources."""
    return ",".join("kv=0.9x" if limit.resource == "kv_bytes_per_token" else "size=0.9x" for limit in limits)


def _alone(kind: str, decision: Decision, limits: Budget, width: int, seed: int) -> Allocation:
    """The best choice of one kind of treatment for weights; cache budgets beside it."""
    options = [o for o in decision.table.options if all(t.tag in (kind, *WEIGHTLESS) for t in o.treatments)]
    table = dataclasses.replace(decision.table, options=tuple(options))
    bounds = limits_of(limits, table, decision.refs, -1, width)
    return ALLOCATORS.get("integer")(table, bounds, seed=seed)


if __name__ == "__main__":
    main()
