from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwright.core.errors import BudgetError, CheckError, InputError
from layerwright.recipes import shape as module
from layerwright.recipes._shape_family import enumerate_shapes, parse_count
from layerwright.recipes._shape_state import RunState
from layerwright.recipes._shape_tasks import TASKS, open_task, task_name
from layerwright.recipes.shape import ShapeSettings, compare_shapes, label

FAST = ShapeSettings(24_000, "supervised", depths=(1, 2), tolerance=0.2, steps=2, batch=2, seeds=2, rounds=2)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    return {name: open_task(name) for name in TASKS}


def test_budgets() -> None:
    given = {"10M": 1e7, "250k": 250e3, "1e6": 1e6, "1.5B": 1.5e9, " 3 m": 3e6, "42": 42}
    assert {text: parse_count(text) for text in given} == given
    for text in ("", "M", "1T", "1e400", "0.2", "nan", "1,000"):
        with pytest.raises(BudgetError, match="expected a number of parameters such as 10M"):
            parse_count(text)


def test_names() -> None:
    assert task_name("text") == "lm" and task_name("images") == "mae"
    assert [task_name(*pair) for pair in TASKS.values()] == list(TASKS)
    assert task_name("mlm", "masked") == "mlm"


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_and_judges(name: str, tasks: dict[str, Any]) -> None:
    task = tasks[name]
    (shape,) = enumerate_shapes(dataclasses.replace(FAST, depths=(2,)), task)
    model = task.build(shape, 0)
    inside = sum(
        parameter.numel()
        for path, parameter in model.named_parameters()
        if parameter.dim() == 2
        and any(part in path for part in ("layers.", "layer.", "blocks."))
        and "decoder" not in path
    )
    assert inside == shape.params == pytest.approx(24_000, rel=0.2)
    items = task.items(3, 2, 5)
    assert len(items) == 3
    for one, two in zip(items, task.items(3, 2, 5), strict=True):
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (one, two)), strict=True):
            assert torch.equal(a, b)
    loss = task.loss(model, items[0])
    loss.backward()
    assert loss.dim() == 0 and torch.isfinite(loss)
    found = task.judge(model.eval())
    assert found.keys() == {"quality", "loss"} and found["loss"] > 0
    if task.quality == "bits/byte":
        assert found["quality"] == pytest.approx(8, abs=0.5)
        assert found["quality"] == pytest.approx(found["loss"] / 0.693147, rel=1e-5)
    if "accuracy" in task.quality:
        assert 0 <= found["quality"] <= 1
    assert task.judge(model) == found
    assert task.trunk(model)(task.example(2)) is not None


def test_held_out_text_is_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(32, 122)) * 100 + b"~" * 1000)
    task = open_task("lm", path)
    assert not any((ids == ord("~")).all() for ids in task.items(20, 2, 0))
    assert task.judge(task.build(enumerate_shapes(FAST, task)[0], 0))["quality"] > 6


def test_shapes(tasks: dict[str, Any]) -> None:
    shapes = enumerate_shapes(ShapeSettings(10e6, "lm"), tasks["lm"])
    assert len(shapes) == 4 and all(abs(s.params / 10e6 - 1) <= 0.05 and s.dim % s.heads == 0 for s in shapes)
    assert [s.layers for s in shapes] == sorted(s.layers for s in shapes)
    tiny = enumerate_shapes(ShapeSettings(100e3, "lm"), tasks["lm"])
    assert [s.name for s in tiny] == ["1x92", "2x64", "3x52", "8x32"]
    assert [s.dim // s.heads for s in tiny] == [46, 16, 26, 16]  # even divisors
    flops = enumerate_shapes(ShapeSettings(10e6, "mlm", match="flops"), tasks["mlm"])
    costs = [s.flops_per_token(128) for s in flops]
    assert max(costs) / min(costs) < 1.11
    varied = enumerate_shapes(ShapeSettings(10e6, "mlm", aspect=("ffn", "heads"), tolerance=0.1), tasks["mlm"])
    assert len({s.layers for s in varied}) == 1
    assert len({round(s.ffn_dim / s.dim) for s in varied}) > 1 and len({s.dim // s.heads for s in varied}) > 1
    with pytest.raises(BudgetError, match=r"no width for .*7x.*feasible"):
        enumerate_shapes(ShapeSettings(1e6, "mlm", depths=(4, 7), head_dim=64), tasks["mlm"])


def test_a_run_that_fails_is_listed_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._train

    def train(task: Any, settings: Any, model: Any, steps: int, seed: int) -> None:
        if steps == FAST.steps and seed == 1 and len(model.encoder.blocks) == 2 and not module_told:
            raise InputError("tuning: the loss is not finite at step 1: lower the learning rate")
        real(task, settings, model, steps, seed)

    module_told: list[str] = []
    monkeypatch.setattr(module, "_train", train)
    report = compare_shapes(FAST)
    deep = report.rows[1]
    assert deep["layers"] == 2 and deep["failed"] == 1
    assert [row.name for row in report.ranking] == [report.rows[0]["shape"]]
    assert report.best == report.fastest == report.rows[0]["shape"]


def test_a_killed_comparison_goes_on(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def stop(_what: str, done: int, _total: int) -> None:
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        compare_shapes(FAST, tmp_path / "a", progress=stop)
    seen: list[str] = []
    gone_on = compare_shapes(FAST, tmp_path / "a", progress=lambda what, *_: seen.append(what))
    assert len(seen) == 1
    whole = compare_shapes(FAST)
    for one, two in zip(gone_on.runs, whole.runs, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in two.items() if k != "seconds"}
    assert label(enumerate_shapes(FAST, open_task("supervised"))[0]) == gone_on.rows[0]["shape"]


def test_force_removes_only_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    state = RunState(tmp_path, {"a": 1}, force=True)
    state.add("k", {"x": 1})
    assert RunState(tmp_path, {"a": 1}).get("k") == {"x": 1}
    with pytest.raises(InputError, match="another a"):
        RunState(tmp_path, {"a": 2})
    assert RunState(tmp_path, {"a": 2}, force=True).get("k") is None
    assert (tmp_path / "mine.txt").is_file() and not (tmp_path / "runs.json").exists()


def test_all_problems_at_once() -> None:
    with pytest.raises(CheckError) as caught:
        compare_shapes(dataclasses.replace(FAST, steps=0, seeds=0, match="x", aspect=(), rate=float("inf")))
    assert len(caught.value.problems) == 5
