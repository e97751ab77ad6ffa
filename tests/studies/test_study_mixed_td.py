from __future__ import annotations

import json
import math

import torch

from layerwright.studies.mixed_td import run, shape_images


def test_quick_form_measures_every_claim() -> None:
    said: list[tuple[str, int, int]] = []
    evidence = run(quick=True, seeds=1, progress=lambda *line: said.append(line))
    data = json.loads(json.dumps(evidence.to_data()))
    assert data["slug"] == "mixed-td" and data["seeds"] == [0]
    assert len(data["checks"]) == 5 and all(math.isfinite(check["measured"]) for check in data["checks"])
    # The target holds by construction; the others are measured.
    assert evidence.checks[0].holds
    rows = {row["search"]: row for row in data["table"]}
    assert {"as it is", "mixed", "SVD only", "CP only", "MACs only"} <= set(rows)
    assert rows["as it is"]["held out"] > 0.3
    assert all(0 < rows[name]["MACs"] < 1 for name in ("mixed", "SVD only", "CP only", "MACs only"))
    assert len(said) == 4


def test_shapes_are_repeatable_and_differ_by_class() -> None:
    images, labels = shape_images(400, seed=1, noise=0.0)
    again, _ = shape_images(400, seed=1, noise=0.0)
    assert torch.equal(images, again) and images.shape == (400, 1, 16, 16)
    assert set(labels.tolist()) == set(range(8))
    assert all(0.02 < float((images[labels == k] > 0).float().mean()) < 0.7 for k in range(8))
