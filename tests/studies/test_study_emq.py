from __future__ import annotations

import math

import numpy as np

from layerwright.studies.emq import _random_plans, run


def test_quick_form_measures_every_claim() -> None:
    said: list[str] = []
    evidence = run(quick=True, seeds=1, progress=lambda what, _done, _total: said.append(what))
    assert evidence.slug == "emq" and len(evidence.checks) == 14 and said
    assert all(math.isfinite(check.measured) for check in evidence.checks)
    checks = {check.name: check for check in evidence.checks}
    assert checks["best of the same candidates without screening less with it"].holds
    assert checks["proxies evaluated in full with screening over without"].measured < 1
    rows = {row["proxy"]: row for row in evidence.table}
    assert {"snip", "synflow", "fisher", "hawq", "hawq2", "qe", "ompq", "size", "bops"} <= set(rows)
    for name in ("evolved", "evolved, rounding errors"):
        assert -1 <= rows[name]["rho"] <= 1
        assert rows[f"{name}, plans"]["average bits"] <= 3.0
    assert 0 < rows["linear in bits, fitted to the vectors that judge"]["rho"] <= 1
    assert rows["search"]["forms"] <= 12


def test_random_plans_keep_to_the_size() -> None:
    costs = np.outer(np.arange(1, 9), (2, 3, 4))
    limit = 3.0 * 36
    for plan in _random_plans(costs, limit, 10, 0):
        assert 0.97 * limit <= costs[np.arange(8), plan].sum() <= limit
