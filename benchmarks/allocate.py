"""How long allocators take, and how much damage they leave: ``python -m benchmarks.allocate [--repeats 3] [--json]``.

The table is a decoder's: blocks of seven layers of different size and sensitivity, each kept or quantized, pruned or
factorized, and blocks that can be dropped. The peer is the same integer program given to HiGHS as it stands, as the
published program does. Both run in turn in one process; ratios are medians over the pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np

from layerwright.allocate import ALLOCATORS, integer
from layerwright.allocate.problem import make_problem
from layerwright.allocate.program import solve_program
from layerwright.core.cost import Cost, total
from layerwright.core.errors import BudgetError
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Drop, LowRank, Quantize, Sparsify, Treatments

FORMS: tuple[Treatments, ...] = (
    (),
    *(((Quantize(bits, group),)) for bits in (2, 3, 4, 5, 6, 8) for group in (-1, 64)),
    (Sparsify(0.5),),
    (Sparsify(0.5), Quantize(8)),
    (LowRank(64),),
)
BUDGETS: tuple[Mapping[str, float], ...] = ({"bytes": 0.35}, {"bytes": 0.25}, {"bytes": 0.2})
TOGETHER: Mapping[str, float] = {"bytes": 0.25, "ms": 0.25, "flops": 0.6}
LIMIT_SECONDS = {"200 layers x 12, one limit": 1.0, "10,000 options, three budgets": 2.0}


def make_table(layers: int, forms: int, seed: int, drops: bool = True) -> OptionTable:
    """A decoder's table with `forms` options per layer, and one `Drop` per block of seven layers."""
    random = np.random.default_rng(seed)
    rows: list[Option] = []
    for i in range(layers):
        path, weights = f"model.layers.{i // 7}.linear{i % 7}", float(random.integers(1, 16) * 2**18)
        sensitivity = math.exp(random.normal(0, 1.5)) * 1e-3
        for form in FORMS[:forms]:
            share, loss = _share_and_loss(form)
            noise = math.exp(random.normal(0, 0.2)) if form else 1.0
            size = round(2 * weights * share)
            rows.append(
                Option(
                    layer=path,
                    treatments=form,
                    cost=Cost(weights, size, 2 * weights * min(1.0, 2 * share), 0.0, size * 1e-9 * noise, "modelled"),
                    damage=sensitivity * loss * noise,
                )
            )
    if drops:
        for block in range(layers // 7):
            covers = tuple(f"model.layers.{block}.linear{k}" for k in range(7))
            damage = math.exp(random.normal(-3, 1.5))
            rows.append(Option(f"model.layers.{block}", (Drop(),), Cost(bytes=-8192.0), damage, covers))
    kept = total(option.cost for option in rows if not option.treatments)
    return OptionTable(tuple(rows), Cost(), kept)


def _share_and_loss(form: Treatments) -> tuple[float, float]:
    """Bytes left of 16 bits, and a damage relative to the layer's sensitivity."""
    share, loss = 1.0, 0.0
    for t in form:
        if isinstance(t, Quantize):
            share *= (t.bits + (0.25 if t.group_size > 0 else 0.0)) / 16
            loss += 4.0 ** (2 - t.bits) * (0.6 if t.group_size > 0 else 1.0)
        elif isinstance(t, Sparsify):
            share, loss = share * 0.5 + 1 / 16, loss + 0.05
        else:
            share, loss = share * 0.4, loss + 0.3
    return share, loss


def absolute(table: OptionTable, shares: Mapping[str, float]) -> dict[str, float]:
    """Limits as shares of the untouched model."""
    return {name: share * table.original.get(name) for name, share in shares.items()}


def plain_program(table: OptionTable, limits: Mapping[str, float]) -> float:
    """The peer: every option goes to HiGHS; returns the damage."""
    problem = make_problem(table, limits)
    found = solve_program(problem, problem.damage, np.ones(len(table), dtype=bool)).chosen
    return math.nan if found is None else float(problem.damage[found].sum())


def timed(call: Callable[[], object]) -> tuple[float, object]:
    """Seconds and result of one call."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def targets(repeats: int) -> list[dict[str, object]]:
    """The stated targets: the best of `repeats` runs against its limit."""
    small, large = make_table(200, 12, 0, drops=False), make_table(665, 15, 0)
    cases: dict[str, Callable[[], object]] = {
        "200 layers x 12, one limit": lambda: integer(small, absolute(small, {"bytes": 0.25})),
        "10,000 options, three budgets": lambda: [integer(large, absolute(large, b)) for b in BUDGETS],
    }
    rows = []
    for name, call in cases.items():
        seconds = min(timed(call)[0] for _ in range(repeats))
        rows.append(
            {"case": name, "seconds": seconds, "bound": LIMIT_SECONDS[name], "holds": seconds <= LIMIT_SECONDS[name]}
        )
    return rows


def side_by_side(repeats: int) -> list[dict[str, object]]:
    """`integer` against the plain program, in turn."""
    rows = []
    for layers, forms, shares in ((200, 12, BUDGETS[1]), (665, 15, BUDGETS[1]), (665, 15, TOGETHER)):
        ratios, ours = [], []
        for seed in range(repeats):
            table = make_table(layers, forms, seed)
            limits = absolute(table, shares)
            seconds, _ = timed(lambda table=table, limits=limits: integer(table, limits))  # type: ignore[misc]
            peer, _ = timed(lambda table=table, limits=limits: plain_program(table, limits))  # type: ignore[misc]
            ours.append(seconds)
            ratios.append(peer / seconds)
        rows.append(
            {
                "options": len(table),
                "limits": ", ".join(shares),
                "seconds": statistics.median(ours),
                "plain program / ours": statistics.median(ratios),
                "spread": f"{min(ratios):.2f} to {max(ratios):.2f}",
            }
        )
    return rows


def quality() -> list[dict[str, object]]:
    """Every allocator on one table: seconds, and damage relative to the integer program's."""
    table, rows = make_table(224, 12, 0), []
    for shares in (BUDGETS[1], TOGETHER):
        limits = absolute(table, shares)
        best = integer(table, limits).damage
        for name in ALLOCATORS:
            try:
                seconds, found = timed(lambda name=name, limits=limits: ALLOCATORS.get(name)(table, limits))  # type: ignore[misc]
                ratio = f"{found.damage / best:.4f}"  # type: ignore[attr-defined]
            except BudgetError as error:
                seconds, ratio = math.nan, str(error)[:60]
            rows.append(
                {"allocator": name, "limits": ", ".join(shares), "seconds": seconds, "damage / integer's": ratio}
            )
    return rows


def show(title: str, rows: list[dict[str, object]]) -> None:
    """One table as text."""
    print(f"\n{title}")
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(c) for c in column) for column in zip(rows[0], *cells, strict=True)]
    for line in (list(rows[0]), *cells):
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def main() -> int:
    """Print the tables; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = {
        "targets": targets(arguments.repeats),
        "integer and the plain program": side_by_side(arguments.repeats),
        "all allocators": quality(),
    }
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        for title, rows in results.items():
            show(title, rows)
    return 0 if all(row["holds"] for row in results["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
