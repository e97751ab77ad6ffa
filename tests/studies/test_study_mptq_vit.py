from __future__ import annotations

import json
import math

import pytest
import torch

from layerwright.core.evidence import Evidence
from layerwright.studies.mptq_vit import gelu_errors, run, smoothing_errors


def test_quick_form_measures_every_claim() -> None:
    said: list[tuple[str, int, int]] = []
    state = torch.get_rng_state()
    evidence = run(quick=True, seeds=1, progress=lambda *line: said.append(line))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(evidence, Evidence) and evidence.slug == "mptq-vit"
    assert [check.name[:3] for check in evidence.checks] == ["(1)"] * 5 + ["(2)"] * 4 + ["(3)"] * 3
    assert all(math.isfinite(check.measured) for check in evidence.checks)
    assert evidence.checks[-1].holds
    assert {what for what, done, total in said if done == total} == {
        "single layers",
        "training networks",
        "one precision",
        "mixed precision",
    }
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
