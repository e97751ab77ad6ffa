from __future__ import annotations

import json
import math

from layerwright.allocate.luc import LayerCompression
from layerwright.studies.edge_llm import run, spread_compression, uniform_compression


def test_quick_form_measures_every_claim() -> None:
    evidence = run(quick=True, seeds=1)
    data = json.loads(json.dumps(evidence.to_data()))
    assert data["slug"] == "edge-llm" and data["seeds"] == [0] and len(data["checks"]) == 7
    assert all(math.isfinite(check["measured"]) for check in data["checks"])
    rows = {row["model"]: row for row in data["table"]}
    assert {"exit 5", "exit 6", "vote", "vote, calibrated", "full", "compressed"} <= set(rows)
    assert {"calibration, by the rules", "calibration, by the rules, relative"} <= set(rows)
    assert rows["full"]["perplexity"] < rows["compressed"]["perplexity"]
    memory, seconds = data["checks"][:2]
    assert memory["holds"] and memory["measured"] > 0.1 and seconds["measured"] < 1


def test_the_uniform_rival_has_the_same_means() -> None:
    chosen = {f"b{i}": LayerCompression(8 if i < 3 else 4, 0.1 * i) for i in range(5)}
    rival = uniform_compression(chosen)
    assert sum(own.bits for own in rival.values()) == 32 and {own.bits for own in rival.values()} == {6, 7}
    assert all(math.isclose(own.sparsity, 0.2) for own in rival.values())
    other = spread_compression(chosen)
    assert [own.bits for own in other.values()] == [4, 8, 4, 8, 8]
    assert all(math.isclose(own.sparsity, 0.2) for own in other.values())
