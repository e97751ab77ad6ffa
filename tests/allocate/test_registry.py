from __future__ import annotations

import subprocess
import sys

import pytest

from layerwright.allocate import ALLOCATORS
from layerwright.core.errors import BudgetError, InputError
from oracles.allocate import layered_table

NAMES = ["bit_search", "clusters", "evolution", "greedy", "integer", "lagrangian", "one_shot", "uniform"]


def test_names():
    assert ALLOCATORS.names() == NAMES
    with pytest.raises(InputError, match="unknown allocator 'integr'; did you mean integer"):
        ALLOCATORS.get("integr")


@pytest.mark.parametrize("name", NAMES)
def test_same_table_limits_and_seed_give_the_same_choice(name):
    table = layered_table(12, 40, 6, per_block=4, ties=True)
    limits = {"bytes": 0.75 * table.original.bytes}
    first, again = (ALLOCATORS.get(name)(table, limits, seed=5) for _ in range(2))
    assert first == again
    assert first.method == name
    assert first.cost.bytes <= limits["bytes"]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "one_shot"])
@pytest.mark.parametrize("limits", [{"bytes": 1.0}, {"ms": 1.0, "bytes": 1e12}])
def test_a_budget_out_of_reach_says_what_is_in_reach(name, limits):
    table = layered_table(12, 8, 4)
    with pytest.raises(BudgetError, match=r"reachable minimum is [\d,.]+ (bytes|ms) \(0\.\d+x"):
        ALLOCATORS.get(name)(table, limits)


def test_importing_the_room_loads_no_solver():
    code = "import sys, layerwright.allocate; print('scipy' in sys.modules, 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
