from __future__ import annotations

import dataclasses

import pytest

from layerwright.score.device import h100
from layerwright.studies import duplex as study


@pytest.fixture(scope="module")
def evidence():
    return study.run(quick=True)


def test_the_quick_form_holds(evidence) -> None:
    assert evidence.slug == "duplex" and evidence.seeds == (0,)
    failed = [check for check in evidence.checks if not check.holds]
    assert failed == []
    assert len(evidence.checks) == 14


@pytest.mark.parametrize(
    ("batch", "name", "expected"), [(32, "Duplex", 2.60), (64, "Duplex", 1.63), (64, "Bank-PIM", 1.03)]
)
def test_the_figures_of_an_independent_roofline(batch, name, expected) -> None:
    """Those of a bare roofline of forty lines, written before this one; prompts and answers of 256 tokens."""
    found = study._mean_gains([study._serve(("ideal", "mixtral", 256, batch), ("GPU", name), 500, 0)])
    assert found[name] == pytest.approx(expected, rel=0.03)


def test_links_and_whole_experts_cost_gains(evidence) -> None:
    rows = {
        (r["setting"], r["tokens"], str(r["batch"])): r
        for r in evidence.table
        if r.get("model") == "mixtral" and "setting" in r
    }
    for tokens in (256, 4096):
        for batch in ("32", "64"):
            assert rows["full", tokens, batch]["Duplex / GPU"] < rows["ideal", tokens, batch]["Duplex / GPU"]


def test_the_checks_can_fail(monkeypatch) -> None:
    plain = {name: dataclasses.replace(item, device=h100(), policy="gpu") for name, item in study.SYSTEMS.items()}
    monkeypatch.setattr(study, "SYSTEMS", plain)
    runs = [study._serve(("full", "mixtral", 256, 32), ("GPU", "Duplex"), 10, 0)]
    gains = study._mean_gains(runs)
    assert gains["Duplex"] == pytest.approx(1.0)
    assert study._tail_ratio(32, 10, 0) == pytest.approx(1.0)
