from __future__ import annotations

import torch

from layerwright.studies.dlo import CoinRouter, run


def test_coins_fall_as_often_as_they_should() -> None:
    router = CoinRouter(4, 0.7, seed=3)
    x = torch.zeros(100, 100, 4)
    first, second = router(x) > 0.5, router(x) > 0.5
    assert abs(float(first.float().mean()) - 0.7) < 0.02
    assert not torch.equal(first, second)
    assert torch.equal(first, CoinRouter(4, 0.7, seed=3)(x) > 0.5)


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "dlo"
    assert [row["arm"] for row in evidence.table] == [
        "before tuning",
        "8 blocks, dense",
        "10 blocks, dense",
        "DLO",
        "random skipping",
        "DLO, own labels",
    ]
    assert evidence.checks[0].holds
    rows = {row["arm"]: row for row in evidence.table}
    assert rows["10 blocks, dense"]["executed"] == 1
    assert abs(rows["random skipping"]["executed"] - 0.7) < 0.05
    assert rows["10 blocks, dense"]["nats/byte"] < rows["before tuning"]["nats/byte"]
