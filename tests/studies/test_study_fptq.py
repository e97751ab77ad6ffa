from __future__ import annotations

import json
import math

import pytest
import torch

from layerwright.studies._byte_lm import paired_interval
from layerwright.studies.fptq import layer_errors, run


def test_quick_form_measures_every_claim() -> None:
    evidence = run(quick=True, seeds=1)
    data = json.loads(json.dumps(evidence.to_data()))
    assert data["slug"] == "fptq" and len(data["checks"]) == 11
    assert all(math.isfinite(check["measured"]) for check in data["checks"])
    rows = {row["activations"]: row for row in data["table"]}
    # The outliers do not change the function, and FPTQ stays nearer to it than both single strategies.
    assert rows["none"]["perplexity"] == pytest.approx(rows["none, before outliers"]["perplexity"], rel=1e-4)
    assert rows["FPTQ"]["ratio"] < rows["dynamic"]["ratio"] < rows["static"]["ratio"]
    # Behind every norm the largest input is half of the upper bound.
    assert rows["largest input of q_proj"]["most"] == pytest.approx(75, rel=1e-4)
    held = {check.name: check.holds for check in evidence.checks}
    assert held["static everywhere: perplexity over the original's"] and held["groups of 32 against one scale per row"]
    assert held["largest change of a logit by equalization alone"]
    assert held["share of query, key, value, gate and up that are equalized"]


def test_single_layer_errors() -> None:
    """What each strategy cures: dynamic rare huge tokens, equalization outlier channels."""
    rare, steady = layer_errors("tokens"), layer_errors("channels")
    assert rare["dynamic"] <= 0.01 * rare["static"]
    assert steady["lae"] <= 0.4 * steady["dynamic"] and steady["lae"] <= 0.3 * steady["static"]


def test_paired_interval() -> None:
    """The interval is of the differences, whatever the windows have in common."""
    common = torch.tensor([0.0, 50.0, 100.0, 7.0])
    low, high = paired_interval(common + torch.tensor([1.0, 3.0, 1.0, 3.0]), common)
    # Mean 2, standard deviation sqrt(4/3), half width 1.96 x sqrt(4/3) / 2.
    assert (low, high) == pytest.approx((2 - 1.96 / 3**0.5, 2 + 1.96 / 3**0.5))
