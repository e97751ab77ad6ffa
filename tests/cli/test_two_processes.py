"""`layerwright tune` started by `torchrun`: two processes train, one writes and speaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layerwright.data.loading import load

SMALL = ["--samples", "4", "--length", "32", "--steps", "2"]


@pytest.mark.slow
def test_two_processes_write_one_model(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of a short text\n" for n in range(400)))
    script, out = tmp_path / "run.py", tmp_path / "out"
    script.write_text("import sys\nfrom layerwright.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*launch, "tune", str(tiny), "-m", "full", "-d", str(text), "-o", str(out), "--json", *SMALL],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one object: the second process is silent
    assert told["checkpoint"] == str(out) and {"before", "after"} <= told.keys()
    before, after = load(tiny)[0].state_dict(), load(out)[0].state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
