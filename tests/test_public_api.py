from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import layerwright

SRC = Path(__file__).parents[1] / "src"
ROOMS = sorted(path.parent.name for path in (SRC / "layerwright").glob("*/__init__.py"))

PUBLIC = [
    "ApplyReport",
    "Budget",
    "Calibration",
    "Cost",
    "Drop",
    "Evidence",
    "Forecast",
    "KVBudget",
    "LayerRef",
    "LayerwrightError",
    "LowRank",
    "Narrow",
    "Option",
    "Plan",
    "Profile",
    "Quantize",
    "Recipe",
    "RoundCache",
    "Scores",
    "Sparsify",
    "Target",
    "apply",
    "inspect",
    "load",
    "measure",
    "optimize",
    "plan",
    "save",
    "tune",
]


def test_top_level_names() -> None:
    assert layerwright.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(layerwright, name) is not None
    assert set(PUBLIC) <= set(dir(layerwright))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = layerwright.no_such_name


def test_the_verb_tune_stays_a_verb_once_its_room_is_imported() -> None:
    import layerwright.tune as room
    from layerwright.recipes import verbs

    assert callable(layerwright.tune)
    assert "lora" in room.TUNERS
    with pytest.raises(Exception, match="no_such_tuner"):
        layerwright.tune(None, [], "no_such_tuner")
    with pytest.raises(Exception, match="no_such_tuner"):
        verbs.tune(None, [], "no_such_tuner")


LIGHT = """
import json, sys, time, torch
begun = time.process_time()
import layerwright
seconds = time.process_time() - begun
print(json.dumps({"seconds": seconds, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def test_import_is_light() -> None:
    """Processor time, so that a busy machine does not fail it."""
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", LIGHT], capture_output=True, text=True, env={"PYTHONPATH": str(SRC)}, timeout=200
        )
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    assert min(run["seconds"] for run in runs) < 0.3
    heavy = {"transformers", "pandas", "plotly", "datasets", "peft", "accelerate", "onnx", "sklearn"}
    assert not heavy & set(runs[0]["modules"])


def test_nouns_load_nothing_heavy() -> None:
    code = (
        "import sys, layerwright as lw; lw.Budget, lw.Plan, lw.Recipe, lw.Calibration, lw.Quantize, lw.Scores;"
        "print([n for n in ('transformers', 'pandas', 'plotly', 'scipy') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SRC)}, timeout=200
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_room_lists_its_names_sorted(room: str) -> None:
    module = import_module(f"layerwright.{room}")
    names = list(getattr(module, "__all__", []))
    if room not in ("core", "treat"):  # these two are used by module
        assert names, f"layerwright.{room} has no __all__"
    assert len(names) == len(set(names))
    assert names in (sorted(names), sorted(names, key=_constants_first)), f"layerwright.{room}.__all__ is not sorted"
    for name in names:
        assert hasattr(module, name), f"layerwright.{room}.{name}"
    assert module.__doc__


def _constants_first(name: str) -> tuple[int, str]:
    """The order of the linter: constants, classes, functions."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)
