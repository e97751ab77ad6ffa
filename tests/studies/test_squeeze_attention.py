from __future__ import annotations

import json
import math

import pytest

from layerwright.studies.squeeze_attention import ARMS, CONTINUATION, PROMPT, arm_budgets, lookups, run


def test_quick_form_measures_every_claim() -> None:
    evidence = run(quick=True, seeds=1)
    data = json.loads(json.dumps(evidence.to_data()))
    assert data["slug"] == "squeeze-attention" and len(data["checks"]) == 7
    assert all(math.isfinite(check["measured"]) for check in data["checks"])
    rows = [row for row in data["table"] if row["policy"] != "full"]
    assert len(rows) == 9 and {row["arm"] for row in rows} == set(ARMS)
    assert data["checks"][-1]["holds"]
    assert len({row["KV bytes"] for row in rows}) == 1
    assert len({row["nats/byte"] for row in rows}) == 9


def test_lists_come_round() -> None:
    ids, where = lookups(6, 5)
    assert ids.shape == where.shape == (6, PROMPT + CONTINUATION)
    periods = set()
    for row, asked in zip(ids, where, strict=True):
        pairs = bytes(row.tolist()).decode().strip(";").split(";")
        period = next(n for n in range(1, 20) if pairs[n:] == pairs[: len(pairs) - n])
        periods.add(period)
        assert all(len(pair) == 5 and pair[2] == "=" for pair in pairs) and len(pairs) == 24
        again = "".join(pair[3:] for pair in pairs[period:])
        assert bytes(row[asked].tolist()).decode() == again
    assert periods <= {4, 5, 6, 7, 8} and len(periods) > 1
    assert (lookups(6, 5)[0] == ids).all() and not (lookups(6, 6)[0] == ids).all()


@pytest.mark.parametrize("mean", [16, 24, 32])
def test_the_three_hold_as_many_tokens(mean: int) -> None:
    similarity = [0.5, 0.9, 0.91, 0.98, 0.985, 0.99, 0.982, 0.9]
    found = {arm: arm_budgets(similarity, mean, arm, 4) for arm in ARMS}
    assert {sum(own) for own in found.values()} == {8 * mean}
    assert found["squeeze"][5] < mean < found["squeeze"][0] and found["inverted"][0] < mean < found["inverted"][5]
