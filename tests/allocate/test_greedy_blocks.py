from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.allocate.greedy_blocks import greedy_blocks
from layerwright.allocate.subset_evaluations import SubsetEvaluations
from layerwright.core.errors import InputError

NAMES = ("a", "b", "c", "d", "e")
GAINS = {"a": 0.01, "b": 0.2, "c": 0.001, "d": 0.1, "e": 0.05}


def additive(chosen: tuple[str, ...]) -> float:
    return 0.3 + sum(GAINS[name] for name in chosen)


def slow(chosen: tuple[str, ...]) -> tuple[float, float]:
    """As `additive`, in two runs; later blocks are ready sooner."""
    time.sleep(0.01 * (5 - len(chosen)))
    return additive(chosen) - 0.01, additive(chosen) + 0.01


def counted(evaluate: Callable[[tuple[str, ...]], float]) -> tuple[Callable[[tuple[str, ...]], float], list[Any]]:
    seen: list[Any] = []

    def call(chosen: tuple[str, ...]) -> float:
        seen.append(chosen)
        return evaluate(chosen)

    return call, seen


def test_takes_the_known_set_in_order_and_stops_at_the_tolerance() -> None:
    evaluate, seen = counted(additive)
    choice = greedy_blocks(evaluate, NAMES, eps=0.005, baseline=0.0)
    assert choice.keep == ("b", "d", "e", "a")
    assert [step.taken for step in choice.trace] == [True] * 4 + [False]
    assert math.isclose(choice.accuracy, 0.66)
    assert len(seen) == len(set(seen)) == choice.evaluations == sum(5 - i for i in range(5))
    assert choice.trace[-1].best == "c" and math.isclose(choice.trace[-1].gain, 0.001)
    coarse = greedy_blocks(additive, NAMES, eps=0.05)
    assert coarse.keep == ("b", "d"), "a gain of the tolerance itself is not enough"
    assert coarse.evaluations == 1 + 5 + 4 + 3
    assert math.isclose(coarse.baseline, 0.3)


def test_stops_at_the_limit_and_at_once_where_nothing_helps() -> None:
    limited = greedy_blocks(additive, NAMES, max_blocks=2)
    assert limited.keep == ("b", "d") and limited.evaluations == 1 + 5 + 4
    none = greedy_blocks(lambda chosen: 0.5, NAMES, eps=0.0)
    assert none.keep == () and none.accuracy == 0.5 and none.evaluations == 1 + 5
    assert greedy_blocks(additive, NAMES, eps=0.0, max_blocks=99).keep == ("b", "d", "e", "a", "c")


@given(
    st.lists(st.frozensets(st.integers(0, 9), max_size=6), min_size=2, max_size=5),
    st.sampled_from([0.0, 0.05, 0.15]),
)
def test_coverage_is_chosen_as_the_obvious_loop_does(covers: list[frozenset[int]], eps: float) -> None:
    names = [f"block{i}" for i in range(len(covers))]

    def share(chosen: tuple[str, ...]) -> float:
        return len(frozenset().union(*(covers[names.index(name)] for name in chosen))) / 10

    chosen: list[str] = []
    value = 0.0
    while rest := [name for name in names if name not in chosen]:
        best = max(share((*chosen, name)) for name in rest)
        if not best > value + eps + 1e-9:
            break
        chosen.append(next(name for name in rest if share((*chosen, name)) == best))
        value = best
    found = greedy_blocks(share, names, eps=eps)
    assert list(found.keep) == chosen and math.isclose(found.accuracy, value)
    if eps == 0 and chosen:  # forward selection of coverage: at least 1 - 1/e of the best set of that size
        top = max(share(some) for some in itertools.combinations(names, len(chosen)))
        assert value >= (1 - 1 / math.e) * top - 1e-9


def test_ties_go_to_the_cheaper_then_to_the_earlier_block() -> None:
    equal = {(): 0.0} | {(name,): 0.5 for name in NAMES}
    evaluate = lambda chosen: equal.get(chosen, 0.5)  # noqa: E731
    assert greedy_blocks(evaluate, NAMES).keep == ("a",)
    assert greedy_blocks(evaluate, NAMES, costs={"a": 3, "b": 2, "c": 1, "d": 1, "e": 9}).keep == ("c",)
    rounded = lambda chosen: 0.1 + 0.2 if chosen == ("b",) else 0.3 * len(chosen)  # noqa: E731
    assert greedy_blocks(rounded, NAMES, max_blocks=1).keep == ("a",), "rounding is no difference"


def test_the_trace_is_plain_data() -> None:
    choice = greedy_blocks(additive, NAMES, max_blocks=1)
    data = json.loads(json.dumps(choice.to_data()))
    assert data["blocks"] == ["b"] and list(data["trace"][0]["candidates"]) == list(NAMES)


def test_a_stopped_run_goes_on_from_its_file(tmp_path: Path) -> None:
    record = tmp_path / "subtuning.json"
    evaluate, seen = counted(additive)

    def stopping(chosen: tuple[str, ...]) -> float:
        if len(seen) == 8:
            raise KeyboardInterrupt
        return evaluate(chosen)

    with pytest.raises(KeyboardInterrupt):
        greedy_blocks(stopping, NAMES, record=record)
    assert len(json.loads(record.read_text())["evaluations"]) == 8
    choice = greedy_blocks(evaluate, NAMES, record=record)
    assert len(seen) == len(set(seen)) == 1 + 5 + 4 + 3 + 2 + 1
    assert choice.keep == greedy_blocks(additive, NAMES).keep
    assert choice.evaluations == len(seen) - 8
    assert json.loads(record.read_text())["blocks"] == list(choice.keep)
    assert not list(tmp_path.glob("*.tmp"))
    again = greedy_blocks(evaluate, NAMES, record=record)
    assert again.evaluations == 0 and again.keep == choice.keep


def test_a_killed_run_goes_on_from_its_file(tmp_path: Path) -> None:
    record = tmp_path / "subtuning.json"
    code = (
        "import sys, time; from layerwright.allocate.greedy_blocks import greedy_blocks\n"
        "gains = dict(zip('abcde', (0.01, 0.2, 0.001, 0.1, 0.05)))\n"
        "def evaluate(chosen):\n"
        "    time.sleep(0.1)\n"
        "    return 0.3 + sum(gains[name] for name in chosen)\n"
        "greedy_blocks(evaluate, tuple('abcde'), record=sys.argv[1])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", code, str(record)], env=environment)
    while not record.exists() or len(json.loads(record.read_text())["evaluations"]) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    known = len(json.loads(record.read_text())["evaluations"])
    assert 3 <= known < 16
    evaluate, seen = counted(additive)
    assert greedy_blocks(evaluate, NAMES, record=record).keep == greedy_blocks(additive, NAMES).keep
    assert len(seen) == 16 - known


def test_processes_find_the_same_in_any_number_and_order(tmp_path: Path) -> None:
    alone = greedy_blocks(slow, NAMES, eps=0.005)
    several = greedy_blocks(slow, NAMES, eps=0.005, parallel=3, record=tmp_path / "record.json")
    assert several == alone
    assert greedy_blocks(slow, NAMES, eps=0.005, record=tmp_path / "record.json").evaluations == 0
    with pytest.raises(InputError, match="parallel"):
        greedy_blocks(lambda chosen: 0.0, NAMES, parallel=2)


def test_the_order_of_evaluation_does_not_matter() -> None:
    sets = [(), ("a",), ("b", "a"), ("a", "b"), ("e",)]
    with SubsetEvaluations(slow, NAMES, workers=2) as parallel:
        found = parallel(sets)
    plain = SubsetEvaluations(slow, NAMES)
    assert plain(sets[::-1])[::-1] == found
    assert plain.count == 4, "a set is a set"
    assert plain.runs([("b", "a")]) == [slow(("a", "b"))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -0.1}, "eps: got -0.1"),
        ({"eps": math.nan}, "eps"),
        ({"max_blocks": 0}, "max_blocks: got 0"),
        ({"parallel": 0}, "parallel: got 0"),
        ({"blocks": ["a", "a.b"]}, "blocks: a.b stands inside a"),
        ({"blocks": ["a", "a"]}, "blocks: a comes twice"),
        ({"blocks": []}, "blocks: got none"),
        ({"blocks": "ab"}, "blocks: got the text"),
        ({"evaluate": lambda chosen: math.nan if "b" in chosen else 0.1}, r"NaN|nan for the set \{b\}"),
        ({"evaluate": lambda chosen: ()}, "nothing for the set"),
    ],
)
def test_wrong_input_is_refused(settings: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {"evaluate": additive, "blocks": NAMES} | settings
    with pytest.raises(InputError, match=message):
        greedy_blocks(given_.pop("evaluate"), given_.pop("blocks"), **given_)


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    first = SubsetEvaluations(additive, NAMES, path=path, key={"seed": 0, "model": "x"})
    first([("a",)])
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        SubsetEvaluations(additive, NAMES, path=path, key={"seed": 1, "model": "x"})
    assert SubsetEvaluations(additive, NAMES, path=path, key={"seed": 0, "model": "x"}).known == {("a",): (0.31,)}
    path.write_text("{")
    with pytest.raises(InputError, match="no record of evaluated blocks"):
        SubsetEvaluations(additive, NAMES, path=path)
    with pytest.raises(InputError, match="unknown block"):
        SubsetEvaluations(additive, NAMES)([("z",)])
