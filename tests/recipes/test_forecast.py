"""Forecast against measured, in a process of its own; and what the forecast counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from layerwright.core.calibration import Calibration
from layerwright.core.forecast import Forecast
from layerwright.core.layers import treatable
from layerwright.core.plan import Plan
from layerwright.core.treatment import Drop, LowRank, Quantize, Sparsify, Treatments
from layerwright.recipes import forecast as forecasting
from layerwright.recipes.duration import count_work, hidden_size
from layerwright.recipes.forecast import forecast_apply, output_bytes
from layerwright.recipes.speed import TreatmentSpeed, machine_speed, treatment_kind, treatment_speed
from zoo import ZOO

RUN = """
import json, sys
from pathlib import Path
import safetensors.torch, torch, transformers
from layerwright.core.layers import treatable
from layerwright.core.plan import Plan
from layerwright.core.treatment import Quantize
from layerwright.data.demo.train_lm import byte_tokenizer
from layerwright.recipes.apply import apply_job

torch.set_num_threads(1)
folder, out = Path(sys.argv[1]) / "model", Path(sys.argv[1]) / "out"
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=272, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=256,
)
model = transformers.LlamaForCausalLM(config)
model.save_pretrained(folder)
byte_tokenizer().save_pretrained(folder)
Plan(layers={ref.path: (Quantize(3),) for ref in treatable(model)}).save(folder.parent / "plan.yaml")
del model
full, save = [0], safetensors.torch.save_file

def counted(tensors, path, *args, **kwargs):
    save(tensors, path, *args, **kwargs)
    full[0] = max(full[0], sum(p.stat().st_size for p in out.rglob("*") if p.is_file()))

safetensors.torch.save_file = counted
result = apply_job(folder, folder.parent / "plan.yaml", out, samples=24, length=128)
print(json.dumps(result.to_data() | {"fullest": full[0]}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plan of three bits on a random Llama of six blocks, streamed in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path_factory.mktemp("forecast"))],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["streamed"] is True
    return found


def test_memory_is_forecast_within_a_quarter(run: dict[str, Any]) -> None:
    assert run["forecast"]["peak_memory_bytes"] == pytest.approx(run["peak_memory_bytes"], rel=0.25)


def test_disk_is_forecast_within_a_quarter_at_the_end_and_at_the_fullest_moment(run: dict[str, Any]) -> None:
    assert run["forecast"]["finished_bytes"] == pytest.approx(run["disk_bytes"], rel=0.25)
    assert run["forecast"]["disk_bytes"] == pytest.approx(run["fullest"], rel=0.25)
    assert run["fullest"] > 2 * run["disk_bytes"]  # the two are not the same


def test_time_is_forecast_within_a_factor_of_two(run: dict[str, Any]) -> None:
    assert 0.5 < run["forecast"]["seconds"] / run["seconds"] < 2, run["forecast"]


KINDS: dict[str, Treatments] = {
    "int3": (Quantize(3),),
    "int8 rtn": (Quantize(8, method="rtn"),),
    "sparse": (Sparsify(0.5),),
    "rank": (LowRank(4),),
}


@pytest.mark.parametrize("kind", KINDS)
def test_output_bytes_are_the_stored_ones(kind: str) -> None:
    from layerwright.score.costs import stored_bytes_of
    from layerwright.treat.apply import apply_plan

    model, batches = ZOO["llama"]()
    plan = Plan(layers={ref.path: KINDS[kind] for ref in treatable(model)})
    assert output_bytes(model, plan) == stored_bytes_of(apply_plan(model, plan, Calibration(batches))[0])


def test_a_dropped_block_takes_no_disk() -> None:
    model, _ = ZOO["llama"]()
    whole = output_bytes(model, Plan(layers={}))
    block = sum(p.numel() * p.element_size() for p in model.get_submodule("model.layers.1").parameters())
    assert output_bytes(model, Plan(layers={"model.layers.1": (Drop(),)})) == whole - block


def test_memory_and_state_grow_with_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "apply_seconds", lambda *_: 1.0)
    monkeypatch.setattr(forecasting, "resident_bytes", lambda: 0)
    monkeypatch.setattr(forecasting, "peak_memory_bytes", lambda: 0)
    model, batches = ZOO["llama"]()
    plan = Plan(layers={ref.path: (Quantize(3),) for ref in treatable(model)})
    once, twice = (forecast_apply(model, plan, Calibration(batches * n), spent_seconds=5.0) for n in (20, 40))
    state = 20 * sum(batch["input_ids"].numel() for batch in batches) * 32 * 4
    assert twice.peak_memory_bytes - once.peak_memory_bytes == 2 * state
    assert twice.disk_bytes - once.disk_bytes == 2 * state
    assert twice.finished_bytes == once.finished_bytes
    # What was spent, what is to come, and the probes of this machine if they were not measured before.
    assert 6.0 <= once.seconds < 30.0
    free = forecast_apply(model, Plan(layers=dict.fromkeys(plan.layers, (Quantize(3, method="rtn"),))), None)
    assert free.disk_bytes == free.finished_bytes


def test_work_is_counted_from_shapes() -> None:
    model, _ = ZOO["llama"]()
    refs = list(treatable(model))
    weights = {ref.path: ref for ref in refs}
    plan = Plan(layers={ref.path: (Quantize(3),) for ref in refs})
    sizes: dict[str, Any] = {"rows": 100, "length": 10, "blocks": 4, "read": 1.0, "written": 2.0, "state": 3.0}
    work = count_work(model, plan, weights, **sizes)
    # Per block: q, o (32, 32); k, v (16, 32); gate, up (64, 32); down (32, 64), which the first forward leaves out.
    products = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert work.products == 4 * 100 * (2 * products - 2 * 64 * 32) + 2 * 4 * 100 * 10 * 32 * 4
    assert work.moments == 4 * 100 * (3 * 32**2 + 64**2)
    assert (work.read, work.written, work.blocks, work.layers) == (1.0, 2.0 + 4 * 3.0, 4, 28)
    rounding = Plan(layers={ref.path: (Quantize(3, method="rtn"),) for ref in refs})
    idle = count_work(model, rounding, weights, **sizes)
    assert idle.products == idle.moments == idle.values == 0.0
    assert hidden_size(model, refs) == 32


def test_probes_are_positive_and_finite() -> None:
    speed = machine_speed(torch.bfloat16, 64, 128, 64)
    assert all(0 < value < float("inf") for value in vars(speed).values())
    for bits in (2, 8):
        assert 0 < treatment_speed(treatment_kind((Quantize(bits),))).seconds(256, 256) < 60
    assert treatment_kind((Quantize(3, 128),)) == treatment_kind((Quantize(2, 128),))
    assert treatment_kind((Quantize(4, 96),)) == treatment_kind((Quantize(5),))


def test_seconds_grow_with_the_shape() -> None:
    speed = TreatmentSpeed(1e-4, 1e-8, 1e-11)
    assert speed.seconds(512, 256) == pytest.approx(1e-4 * 256 + 1e-8 * 512 * 256)
    assert speed.seconds(512, 1024) > 4 * speed.seconds(512, 256)


def test_the_line_says_both_sizes_where_they_differ() -> None:
    forecast = Forecast(2e9, 30.0, disk_bytes=9e6, output_bytes=2.9e6, finished_bytes=3e6)
    assert str(forecast) == "forecast: peak memory 2.00 GB, 30 s, 3.0 MB on disk (9.0 MB while it runs)"
    assert "while" not in str(Forecast(2e9, 30.0, disk_bytes=3e6, finished_bytes=3e6))
    assert "disk forecast 3.00 MB, measured 3.00 MB (1.00x)" in forecast.compare(2e9, 30.0, 3e6)
