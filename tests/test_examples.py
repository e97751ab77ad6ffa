from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNS = {
    "own_module.py": (["--steps", "40"], ["blocks.0.up", "damage at 3 bits", "before", "after"]),
    "two_budgets.py": (
        ["--samples", "2", "--length", "32"],
        ["bits=4", "bits=3", "output_error.json", "used for both plans"],
    ),
    "edit_plan.py": (["--samples", "16"], [" -> int8 rtn", "planned", "edited", "accuracy"]),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    arguments, expected = RUNS[name]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for text in expected:
        assert text in done.stdout, done.stdout
    assert not list(tmp_path.iterdir()), "an example left files behind"
