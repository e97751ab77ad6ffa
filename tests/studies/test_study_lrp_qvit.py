"""The study of LRP-QViT in its quick form."""

from __future__ import annotations

import json
import math

import torch

from layerwright.core.layers import treatable
from layerwright.studies._vit import build_vit, calibration_digits
from layerwright.studies.lrp_qvit import blow_up, mixed_bits, random_bits, run


def test_quick_form_measures_every_claim() -> None:
    said: list[tuple[str, int, int]] = []
    evidence = run(quick=True, seeds=1, progress=lambda *line: said.append(line))
    data = json.loads(json.dumps(evidence.to_data()))
    assert data["slug"] == "lrp-qvit" and data["seeds"] == [0]
    assert len(data["checks"]) == 6
    assert all(math.isfinite(check["measured"]) for check in data["checks"])
    rows = {row["plan"]: row for row in data["table"]}
    assert rows["clipped"]["accuracy"] > rows["per tensor"]["accuracy"] + 5
    assert rows["clipped"]["calibration KL"] < rows["per tensor"]["calibration KL"]
    assert said and all(0 <= done <= total for _, done, total in said)


def test_blown_up_channels_change_nothing_but_their_range() -> None:
    model, data = build_vit(), calibration_digits(16)
    blown = blow_up(model, data)
    x = next(iter(data))["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(blown(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)
    ratio = blown.vit.layers[0].layernorm_before.weight / model.vit.layers[0].layernorm_before.weight
    assert sorted(ratio.round().tolist()) == [1.0] * 45 + [15.0] * 3


def test_plans_keep_to_their_size() -> None:
    refs = treatable(build_vit())
    size = sum(ref.numel for ref in refs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        bits = random_bits(refs, generator)
        assert sum(ref.numel * bits[ref.path] for ref in refs) == 4 * size
    mixed = mixed_bits(refs, {ref.path: 2.0**-n for n, ref in enumerate(refs)})
    assert sum(ref.numel * mixed[ref.path] for ref in refs) <= 4 * size
    assert mixed[refs[0].path] == 5 and mixed[refs[-1].path] == 3
