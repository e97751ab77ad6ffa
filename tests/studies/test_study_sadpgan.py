from __future__ import annotations

from typing import Any

import pytest

from layerwright.nn.sequence_core import parameter_count
from layerwright.studies import sadpgan
from layerwright.studies.sadpgan import (
    ADAPTED,
    ARMS,
    DROP_IN,
    LSTM,
    PUBLIC,
    Sizes,
    arm_config,
    arm_core,
    run,
    train_arm,
)


def test_arms_are_of_equal_size_and_differ_as_they_say() -> None:
    counts = {arm: parameter_count(arm_core(arm, 0)) for arm in ARMS}
    assert counts[LSTM] == 8448
    for arm in (DROP_IN, ADAPTED):
        assert abs(counts[arm] - counts[LSTM]) <= 0.03 * counts[LSTM]
    assert counts[PUBLIC] == 2 * (4 * 33 * 32 + 2 * 33 * 32 + 4 * 32)
    assert [arm_core(arm, 0).norm for arm in (DROP_IN, PUBLIC, ADAPTED)] == ["post", "post", "pre"]
    drop_in, recurrent, adapted = (arm_config(arm, Sizes(), 1) for arm in (DROP_IN, LSTM, ADAPTED))
    assert drop_in == recurrent
    assert (drop_in.g_lr, drop_in.d_lr, drop_in.clip, drop_in.mle_weight, drop_in.warmup_steps) == (
        1e-2,
        1e-2,
        None,
        0,
        0,
    )
    assert (adapted.g_lr, adapted.clip, adapted.mle_weight) == (1e-3, 12.0, 0.5)


def rows(values: dict[str, tuple[list[float], list[bool]]], loss: dict[str, float]) -> tuple[list[Any], list[Any]]:
    before = [{"arm": arm, "nll_gen": value} for arm, value in loss.items()]
    after = [
        {"arm": arm, "unique_share": share, "collapsed": "yes" if fired else ""}
        for arm, (shares, all_fired) in values.items()
        for share, fired in zip(shares, all_fired, strict=True)
    ]
    return before, after


def test_checks_can_fail() -> None:
    loss = {LSTM: 1.0, DROP_IN: 1.03, ADAPTED: 1.1}
    some = {LSTM: ([0.3] * 3, [False] * 3), ADAPTED: ([0.9] * 3, [False] * 3)}
    fired = sadpgan._checks(*rows(some | {DROP_IN: ([0.2] * 3, [True, True, False])}, loss))
    assert [check.holds for check in fired] == [True, True, True, True]
    assert fired[1].measured == 2 and fired[1].bound == 2 and fired[2].measured == 0 and fired[2].bound == 1
    shares = sadpgan._checks(*rows(some | {DROP_IN: ([0.1] * 3, [False] * 3)}, loss))
    assert [check.holds for check in shares] == [True, True, True]
    nothing = sadpgan._checks(*rows(some | {DROP_IN: ([0.5] * 3, [False] * 3)}, loss | {DROP_IN: 1.01}))
    assert [check.holds for check in nothing] == [False, False, False]
    assert "NOT reproduced" not in sadpgan._contrast(rows(some | {DROP_IN: ([0.2] * 3, [True] * 3)}, loss)[1])
    both = {LSTM: ([0.03] * 3, [True] * 3), DROP_IN: ([0.03] * 3, [True] * 3), ADAPTED: ([0.9] * 3, [False] * 3)}
    assert [check.holds for check in sadpgan._checks(*rows(both, loss))] == [True, True, False, True]
    assert "NOT reproduced" in sadpgan._contrast(rows(both, loss)[1])
    fewer = both | {DROP_IN: ([0.001] * 3, [True] * 3)}  # a share between two collapses is no evidence
    assert [check.holds for check in sadpgan._checks(*rows(fewer, loss))] == [True, True, False, True]


def test_a_run_can_be_repeated() -> None:
    sizes = Sizes(sentences=128, heldout=64, mle_epochs=2, adversarial_epochs=2, d_steps=1, d_samples=64)
    first, second = (
        [
            {k: v for k, v in row.items() if k != "CPU seconds"}
            for row in train_arm(DROP_IN, sizes, 3, {"eval_samples": 50})
        ]
        for _ in range(2)
    )
    assert first == second
    assert [row["after"] for row in first] == ["mle", "adversarial"]


@pytest.mark.slow
def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "sadpgan"
    assert [(row["arm"], row["after"]) for row in evidence.table] == [
        (arm, phase) for arm in (LSTM, DROP_IN, ADAPTED) for phase in ("mle", "adversarial")
    ]
    before, after = evidence.table[::2], evidence.table[1::2]
    assert all(row["nll_gen"] > 0.93 and row["unique_share"] > 0.8 for row in before)
    assert evidence.checks[0].measured == before[1]["nll_gen"]
    assert evidence.checks[0].bound == pytest.approx(before[0]["nll_gen"] + 0.02)
    assert evidence.checks[-1].measured == after[2]["unique_share"]
    assert evidence.checks[-1].bound == pytest.approx(2 * after[1]["unique_share"])
    assert after[0]["nll_div"] < before[0]["nll_div"] - 0.3 and after[1]["nll_div"] < before[1]["nll_div"] - 0.3
    assert after[2]["self_bleu_3"] < 0.7
