"""Tuning by two processes that `torchrun` starts: the same steps as one process with twice the batches in each."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.tune import distill, full

SCRIPT = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
import torch

from layerwright.core.processes import main_process, process_count
from two_processes_model import batches, built, loss_fn
from layerwright.tune import distill, full

torch.set_num_threads(1)
assert process_count() == 2
rank = 0 if main_process() else 1
model, teacher = built(0), built(1)
tuned = full(model, batches(), loss_fn=loss_fn, steps=5, learning_rate=1e-2, seed=3)
near = distill(model, [x for x, _ in batches()], teacher=teacher, parameters="all", steps=5, learning_rate=1e-2, seed=4)
torch.save((tuned.state_dict(), near.state_dict()), Path(sys.argv[1]) / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""

MODEL = """
import torch
from torch import nn


def built(seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def batches():
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(8, 6, generator=generator), torch.randn(8, 4, generator=generator)) for _ in range(6)]


def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each of two processes ended with."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two_processes_model.py").write_text(MODEL)
    (folder / "tune.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(folder / "tune.py"), str(folder), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder


def read(folder: Path, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = torch.load(folder / f"{rank}.pt", weights_only=True)
    return found


def alone(folder: Path) -> tuple[nn.Module, nn.Module]:
    names = runpy.run_path(str(folder / "two_processes_model.py"))
    built, batches, loss_fn = names["built"], names["batches"], names["loss_fn"]
    settings: dict[str, Any] = {"steps": 5, "learning_rate": 1e-2, "batches_per_step": 2}
    model, teacher = built(0), built(1)
    one = full(model, batches(), loss_fn=loss_fn, seed=3, **settings)
    inputs = [x for x, _ in batches()]
    other = distill(model, inputs, teacher=teacher, parameters="all", seed=4, **settings)
    return one, other


def test_both_processes_end_with_the_same_weights(tuned: Path) -> None:
    for mine, other in zip(read(tuned, 0), read(tuned, 1), strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_they_make_the_steps_of_one_process_with_twice_the_batches(tuned: Path) -> None:
    for found, expected in zip(read(tuned, 0), alone(tuned), strict=True):
        assert found.keys() == expected.state_dict().keys()
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
