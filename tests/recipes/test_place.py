from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from layerwright.core.errors import CheckpointError, InputError
from layerwright.recipes.place import Load, place_job, save_place
from layerwright.recipes.serving.shapes import shape_of
from layerwright.recipes.serving.systems import system_of
from layerwright.score.device import device, duplex, h100, preset_shape

SMALL = Load(batch=8, prompt=64, new=32, steps=30)
CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 99,
}


@pytest.fixture(scope="module")
def result():
    return place_job("mixtral", "duplex", SMALL, compare=("gpu", "pim", "hetero", "split", "bank_pim", "2xgpu"))


def test_layers_systems_and_gains(result) -> None:
    assert result.system == "duplex"
    assert list(result.reports) == ["duplex", "gpu", "pim", "hetero", "split", "bank_pim", "2xgpu"]
    assert result.gain("gpu") > 1.5
    assert {kind.stage for kind in result.kinds} == {"decode", "mixed", "prefill"}
    sides = {(kind.stage, kind.kind): kind.processor for kind in result.kinds}
    assert sides["decode", "experts"] == "both" and sides["decode", "attention.decode"] == "low"
    assert sides["mixed", "qkv"] == sides["mixed", "attention.prefill"] == "high"
    decode = {kind.kind: kind for kind in result.kinds if kind.stage == "decode"}
    assert decode["experts"].op_per_byte < 4 and decode["qkv"].layers == 32


def test_files(result, tmp_path) -> None:
    save_place(result, tmp_path / "out")
    data = yaml.safe_load((tmp_path / "out" / "place.yaml").read_text())
    assert (data["model"], data["device"], data["devices"], data["policy"]) == ("mixtral", "duplex", 4, "duplex+pe+et")
    layers = data["stages"]["decode"]
    assert layers["layers.3.qkv"]["processor"] == "high" and layers["layers.3.qkv"]["microseconds"] > 0
    assert layers["layers.3.experts"]["processor"] == "both"
    assert set(layers["layers.3.experts"]["low_experts"]) <= set(range(8))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["gains"]["gpu"] == pytest.approx(result.gain("gpu"))
    assert found["systems"]["duplex"]["tbt"]["percentiles"][50] > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["place.yaml", "results.json"]


def test_same_seed_same_files(result, tmp_path) -> None:
    again = place_job("mixtral", "duplex", SMALL, compare=("gpu",))
    assert again.place_data() == result.place_data()
    assert again.reports["gpu"] == result.reports["gpu"]


@pytest.mark.parametrize(
    ("model", "on", "settings"),
    [
        ("grok1", "duplex", {}),
        ("opt-66b", "bank_pim", {"policy": "duplex"}),
        ("mixtral", "hetero", {}),
        ("mixtral", "duplex_split", {}),
        ("llama3-70b", "h100", {"compare": ()}),
        ("glam", "duplex", {"policy": "fastest", "efficiency": (0.7, 0.9), "skew": 1.0}),
        ("glam", "duplex", {"policy": "gpu"}),
    ],
)
def test_every_kind_of_system(model, on, settings) -> None:
    found = place_job(model, on, SMALL, **settings)
    assert found.reports[found.system].throughput > 0
    sides = {side for placement in found.placements.values() for side in placement.layers.values()}
    assert sides <= {"high", "low"}
    if on == "h100" or settings.get("policy") == "gpu":
        assert sides == {"high"} and not found.low_experts
    if on == "hetero":
        low = {kind.kind for kind in found.kinds if kind.processor == "low"}
        assert low == {"experts"}


def test_open_loops_and_traces(tmp_path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival,prompt,new\n" + "".join(f"{i / 50},40,5\n" for i in range(20)))
    for load in (Load(batch=8, prompt=40, new=5, rate=50.0, number=20), Load(batch=8, trace=str(trace))):
        found = place_job("mixtral", load=load)
        assert found.reports["duplex"].completed == 20 and found.reports["duplex"].unfinished == 0
    assert str(Load(rate=4.0)) == "4 requests/s, batch 64, 1024 prompt and 1024 new tokens"


def test_systems_that_cannot_serve_are_skipped_with_a_reason() -> None:
    found = place_job("llama3-70b", "duplex", SMALL, compare=("gpu", "hetero"), n_devices=2)
    assert "expected an even number and a model with experts" in found.skipped["hetero"]
    assert list(found.reports) == ["duplex", "gpu"]
    tight = place_job("mixtral", "duplex", SMALL, compare=("split",), n_devices=2)
    assert "do not fit" in tight.skipped["split"]


def test_shapes_by_name(tmp_path) -> None:
    assert shape_of("glam") is preset_shape("glam")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    folder, file = shape_of(str(tmp_path)), shape_of(str(tmp_path / "config.json"))
    assert folder == file and (folder.num_experts, folder.layers) == (4, 2)
    assert shape_of("demo:lm").layers == 8
    found = place_job(str(tmp_path), "duplex", SMALL)
    assert found.n_devices == 1


def test_a_folder_of_the_hub_cache(tmp_path) -> None:
    cache = tmp_path / "models--org--name"
    for revision in ("aaa", "bbb"):
        (cache / "snapshots" / revision).mkdir(parents=True)
        config = {**CONFIG, "num_hidden_layers": 3 if revision == "aaa" else 2}
        (cache / "snapshots" / revision / "config.json").write_text(json.dumps(config))
    assert shape_of(str(cache)).layers == 2
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("aaa")
    assert shape_of(str(cache)).layers == 3
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    with pytest.raises(CheckpointError, match="has no snapshot"):
        shape_of(str(cache))


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("mixtrl", InputError, "unknown model 'mixtrl'; did you mean mixtral"),
        ("demo:nothing", InputError, "unknown demo model"),
        ("./nothing", FileNotFoundError, "no model at ./nothing"),
        ("nothing/config.json/", FileNotFoundError, "no model at"),
    ],
)
def test_models_that_are_not_there(model, kind, message) -> None:
    with pytest.raises(kind, match=message):
        shape_of(model)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    other = tmp_path / "weights.bin"
    other.write_text("")
    with pytest.raises(CheckpointError, match=r"is no config.json"):
        shape_of(str(other))
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_experts_per_tok": 5}))
    with pytest.raises(InputError, match="top_k 5 is more than num_experts 4"):
        shape_of(str(tmp_path))


def test_systems_by_name() -> None:
    assert system_of("gpu", duplex(), 4)[0].low is None
    assert system_of("2xgpu", duplex(), 4)[1] == 8
    pim = system_of("pim", duplex(), 4)[0]
    assert pim.low is None and pim.high == duplex().low
    assert system_of("duplex", duplex(), 4)[2] == "duplex"
    assert system_of("duplex", device("bank_pim"), 4)[0] == duplex()
    assert system_of("hetero", h100(), 4)[0] == device("hetero")
    assert system_of("bank_pim", duplex(), 4, (0.5, 0.6))[0].high.efficiency == 0.5
    with pytest.raises(InputError, match="pim needs a low processor, and h100 has none"):
        system_of("pim", h100(), 4)
    with pytest.raises(InputError, match="unknown system to compare with 'gpus'; did you mean gpu"):
        system_of("gpus", duplex(), 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_devices": 1}, "weights of 93.4 GB do not fit into 85.9 GB"),
        ({"n_devices": 0}, "devices: got 0"),
        ({"n_devices": 9}, "got 9 in 2 nodes"),
        ({"on": "dupleks"}, "unknown device"),
        ({"policy": "fast"}, "unknown policy"),
        ({"compare": ("gpuu",)}, "unknown system"),
        ({"load": Load(rate=-1.0)}, "rate: got -1"),
        ({"load": Load(batch=0)}, "got a batch of 0"),
        ({"load": Load(batch=64, prompt=30_000, new=1000), "strict_memory": True}, "requests fit"),
    ],
)
def test_jobs_that_cannot_be(settings, message) -> None:
    settings = {"load": SMALL, **settings}
    with pytest.raises(InputError, match=message):
        place_job("mixtral", **settings)
