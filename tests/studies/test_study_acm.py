from __future__ import annotations

import torch

from layerwright.studies.acm import RandomGate, run


def test_coins_fall_as_often_as_they_should() -> None:
    gate = RandomGate(4, 0.25, seed=3)
    x = torch.zeros(100, 100, 8)
    first, second = gate(x).argmax(-1), gate(x).argmax(-1)
    assert abs(float(first.float().mean()) - 1) < 0.03
    expected = torch.tensor([0.75**4, 4 * 0.25 * 0.75**3, 6 * 0.25**2 * 0.75**2, 4 * 0.25**3 * 0.75, 0.25**4])
    assert torch.allclose(torch.bincount(first.flatten(), minlength=5) / 10_000, expected, atol=0.02)
    assert not torch.equal(first, second)
    assert torch.equal(first, RandomGate(4, 0.25, seed=3)(x).argmax(-1))


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "acm"
    rows = {(row["arm"], row["budget"]): row for row in evidence.table}
    assert set(rows) == {
        ("original", 1.0),
        *((arm, b) for arm in ("ACM", "fixed width", "ACM, gates by chance", "random gate") for b in (0.5, 0.25)),
        ("ACM, no diversity", 0.5),
    }
    for budget in (0.5, 0.25):
        assert rows["fixed width", budget]["fraction"] == budget
        assert rows["fixed width", budget]["std of u"] == 0
        assert abs(rows["random gate", budget]["fraction"] - budget) < 0.03
        chance = rows["ACM, gates by chance", budget]
        assert abs(chance["fraction"] - rows["ACM", budget]["fraction"]) < 0.03
        assert rows["ACM", budget]["accuracy"] > 0.3
    assert rows["ACM", 0.5]["fraction"] > rows["ACM", 0.25]["fraction"]
    assert [check.holds for check in evidence.checks].count(True) >= 1
    assert len(evidence.checks) == 6
