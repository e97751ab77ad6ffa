from __future__ import annotations

import json
import math

from layerwright.studies.shortened_llama import run


def test_quick_form_measures_every_claim() -> None:
    said: list[tuple[str, int, int]] = []
    evidence = run(quick=True, seeds=1, progress=lambda *line: said.append(line))
    data = json.loads(json.dumps(evidence.to_data()))
    assert {"slug", "claim", "table", "checks", "verdict", "seconds", "seeds", "versions"} <= set(data)
    assert data["slug"] == "shortened-llama" and data["seeds"] == [0]
    assert len(data["checks"]) == 5
    assert all(math.isfinite(check["measured"]) for check in data["checks"])
    rows = {row["plan"]: row for row in data["table"]}
    assert rows["intact"]["nats/byte"] < rows["best of 28 pairs"]["nats/byte"] < rows["worst"]["nats/byte"]
    assert 1 <= rows["PPL"]["rank"] <= 28
    assert max(rows["PPL LoRA"]["nats/byte"], rows["PPL CPT"]["nats/byte"]) < rows["PPL unretrained"]["nats/byte"]
    assert {what for what, _, _ in said} >= {"all pairs", "ranking blocks"}
    assert all(0 <= done <= total for _, done, total in said)
