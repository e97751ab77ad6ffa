from __future__ import annotations

import json
import math

from layerwright.studies.mixllm import run


def test_quick_form_measures_every_claim() -> None:
    said: list[tuple[str, int, int]] = []
    evidence = run(quick=True, seeds=1, progress=lambda *line: said.append(line))
    data = json.loads(json.dumps(evidence.to_data()))
    assert data["slug"] == "mixllm" and data["seeds"] == [0] and len(data["checks"]) == 7
    assert all(math.isfinite(check["measured"]) for check in data["checks"])
    rows = {row["rows"]: row for row in data["table"]}
    interval = rows["loss, global minus weight, int2 rtn: 95 % interval over windows"]
    assert interval["least"] < interval["most"] < 0
    assert rows["original"]["perplexity"] < rows["global int2 rtn"]["perplexity"] < rows["all int2"]["perplexity"]
    spearman = next(check for check in evidence.checks if check.name.startswith("Spearman"))
    assert spearman.holds and evidence.checks[0].holds
    assert all(0 <= done <= total for _, done, total in said)
