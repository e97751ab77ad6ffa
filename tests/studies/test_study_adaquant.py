from __future__ import annotations

import json
import math

import torch

from layerwright.core.evidence import Evidence
from layerwright.studies.adaquant import _policies, run


def test_quick_form_measures_every_claim():
    said: list[tuple[str, int, int]] = []
    state = torch.get_rng_state()
    evidence = run(quick=True, seeds=1, progress=lambda *line: said.append(line))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(evidence, Evidence) and evidence.slug == "adaquant"
    assert [check.name[:3] for check in evidence.checks] == ["(a)", "(b)", "(c)", "(d)", *["(e)"] * 4]
    assert all(math.isfinite(check.measured) for check in evidence.checks)
    rows = {row["method"]: row for row in evidence.table}
    assert rows["full precision"]["accuracy"] > 0.95
    assert rows["AdaQuant"]["layer_mse"] < rows["MSE ranges"]["layer_mse"]
    assert evidence.notes[0].startswith("W3A4")
    assert [what for what, done, total in said if done == total] == ["training the network", "draws of the calibration"]
    data = json.loads(json.dumps(evidence.to_data()))
    assert {"slug", "claim", "table", "checks", "verdict", "seconds", "seeds", "versions"} <= set(data)
    assert all({"name", "measured", "bound", "holds"} <= set(check) for check in data["checks"])


def test_random_policies_keep_to_the_size():
    weights = {str(i): 100 * (i + 1) for i in range(6)}
    limit = sum(weights.values()) * 3 / 8
    for policy in _policies(weights, limit, 20):
        taken = sum(weights[path] * bits for path, bits in policy.items()) / 8
        assert 0.95 * limit <= taken <= limit
