from __future__ import annotations

import json
import math

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.core.evidence import Evidence
from layerwright.studies import _vit
from layerwright.studies.mptq_vit import gelu_errors, run, smoothing_errors


def test_quick_form_measures_every_claim() -> None:
    said: list[tuple[str, int, int]] = []
    state = torch.get_rng_state()
    evidence = run(quick=True, seeds=1, progress=lambda *line: said.append(line))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(evidence, Evidence) and evidence.slug == "mptq-vit"
    assert [check.name[:3] for check in evidence.checks] == ["(1)"] * 5 + ["(2)"] * 8 + ["(3)"] * 3
    assert all(math.isfinite(check.measured) for check in evidence.checks)
    assert evidence.checks[-1].holds
    assert {what for what, done, total in said if done == total} >= {
        "single layers",
        "training networks 48 wide, 2 deep",
        "one precision",
        "mixed precision",
    }
    assert any("twice the gain" in note and "48 x 2" in note for note in evidence.notes)
    for form in ("SQ-b as published", "SQ-b chosen per norm"):
        assert sum(f"{form}: of" in note and "SQ-b on top" in note for note in evidence.notes) == 2
        assert sum(f", {form}: accuracy" in check.name for check in evidence.checks) == 4
    data = json.loads(json.dumps(evidence.to_data()))
    assert {"slug", "claim", "table", "checks", "verdict", "seconds", "seeds", "versions"} <= set(data)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_layer_claims_hold_on_every_seed(seed: int) -> None:
    smoothing = smoothing_errors(seed, 4096)
    assert smoothing["SQ-b"] <= 0.45 * smoothing["SmoothQuant"]
    assert smoothing["SQ-b"] <= 0.35 * smoothing["none"]
    gelu = gelu_errors(seed, 4096)
    assert gelu["OPT-m"] <= 0.5 * gelu["uniform, extremes"]
    assert gelu["OPT-m"] <= gelu["ratio 3"]
    assert gelu["OPT-m"] <= gelu["uniform, clipped"]


@pytest.mark.parametrize(
    ("least", "taken", "tried"),
    [(1.0, (48, 4, 4), 1), (2.5, (48, 4, 3), 2), (5.0, (24, 4, 4), 3), (9.0, (24, 8, 4), 5), (99.0, (24, 8, 3), 6)],
)
def test_a_setting_is_the_first_where_the_start_loses_enough(
    monkeypatch: pytest.MonkeyPatch, least: float, taken: tuple[int, int, int], tried: int
) -> None:
    def shape(seed: int, _epochs: int, depth: int, hidden_size: int) -> torch.nn.Module:
        return torch.nn.Linear(hidden_size, depth)

    def loss(model: torch.nn.Module, seed: int, bits: int) -> float:
        assert isinstance(model, torch.nn.Linear)
        return {(48, 4): 1.0, (24, 4): 4.0, (24, 8): 8.0}[model.in_features, model.out_features] + seed + (bits == 3)

    monkeypatch.setattr(_vit, "small_vit", shape)
    shapes = [(48, 4), (24, 4), (24, 8)]
    found = _vit.find_setting(loss, least, shapes, (4, 3), seeds=3, epochs=1)
    assert (found.hidden_size, found.depth, found.bits) == taken == list(found.lost)[-1]
    assert len(found.lost) == tried and len(found.models) == 3
    assert found.enough == (least < 99)
    # The mean of the seeds counts, not one of them.
    assert found.lost[48, 4, 4] == 2.0


def test_no_setting_to_try_is_refused() -> None:
    for shapes, bits, seeds in (([], (4,), 1), ([(48, 4)], (), 1), ([(48, 4)], (4,), 0)):
        with pytest.raises(InputError, match="nothing to try"):
            _vit.find_setting(lambda *_: 0.0, 1.0, shapes, bits, seeds=seeds, epochs=1)
