"""Stopping a run from outside: nothing is half-written, and `apply` goes on from its last finished block."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layerwright.cli import main

# 200 samples: slow enough that the signal comes while blocks are being treated.
SIZE = ["--samples", "200", "--length", "64"]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from layerwright.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    file = tmp_path / "plan.yaml"
    roles = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    layers = "".join(f"  model.layers.{n}.{role}: {{quantize: {{bits: 3}}}}\n" for n in range(8) for role in roles)
    file.write_text(f"layerwright_plan: 1\nlayers:\n{layers}")
    return file


def files(folder: Path) -> dict[str, bytes]:
    skip = ("apply.jsonl",)  # holds seconds
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in skip}


def test_stopped_and_killed_runs_go_on_to_the_same_bytes(plan: Path, tmp_path: Path) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert main(["apply", "demo:lm", str(plan), "-o", str(straight), *SIZE]) == 0

    process = start("apply", "demo:lm", plan, "-o", out, *SIZE)
    wait_for(".layerwright-unfinished/state-00002.json", out, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    said = [line for line in stderr.splitlines() if line.startswith("layerwright: ")]
    assert len(said) == 1 and "interrupted" in said[0] and "again to go on" in said[0]
    assert "Traceback" not in stderr
    assert not (out / "model.safetensors.index.json").exists()
    assert main(["measure", str(out)]) == 2  # an unfinished folder is no model

    process = start("apply", "demo:lm", plan, "-o", out, *SIZE)
    wait_for(".layerwright-unfinished/state-00005.json", out, process)
    process.kill()
    process.communicate(timeout=60)
    first = (out / "model-00001.safetensors").stat().st_mtime_ns

    # Other jobs do not take the folder over.
    assert main(["optimize", "demo:lm", "-b", "bits=4", "-o", str(out), *SIZE]) == 2
    assert main(["apply", "demo:lm", str(plan), "-o", str(out), "--samples", "3", "--length", "64"]) == 2

    assert main(["apply", "demo:lm", str(plan), "-o", str(out), *SIZE]) == 0
    assert (out / "model-00001.safetensors").stat().st_mtime_ns == first  # not done again
    assert files(out) == files(straight)


def test_an_interrupted_optimize_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    process = start("optimize", tiny, "-b", "bits=4", "-r", "mixed", "-o", tmp_path / "out", *SIZE)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("scoring"):
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
