from __future__ import annotations

import torch

from layerwright.studies.cost_eff import CLASSES, run, sentences


def test_sentences_are_what_they_are_said_to_be() -> None:
    made = sentences(300, seed=5)
    rows = [row for batch in made.data for row in zip(*(batch[key] for key in batch), strict=True)]
    assert len(rows) == 300
    assert made.hard.float().mean() == 0.5
    for (ids, mask, label), hard in zip(rows, made.hard.tolist(), strict=True):
        words = ids[mask.bool()].tolist()
        assert not ids[~mask.bool()].any() and words[0] == 1
        operands = {(word - 2) // CLASSES: (word - 2) % CLASSES for word in words if 2 <= word < 18}
        selectors = {(word - 20) // 2: (word - 20) % 2 for word in words if 20 <= word < 24}
        cues = [(word - 40) // 4 for word in words if 40 <= word < 56]
        if hard:
            assert set(operands) == {0, 1, 2, 3} and set(selectors) == {0, 1} and not cues
            assert int(label) == operands[2 * selectors[0] + selectors[1]]
        else:
            assert not operands and not selectors and cues == [int(label)]
    again = sentences(300, seed=5)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made.data, again.data, strict=True))


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "cost-eff"
    rows = {row["arm"]: row for row in evidence.table}
    assert list(rows) == [
        "teacher",
        "assistant",
        "COST-EFF",
        "no equalisation",
        "one cut, last exit's scores",
        "one cut, fewer steps",
        "exits after compression",
    ]
    assert len(evidence.checks) == 4
    slender = [rows[arm]["parameters"] for arm in list(rows)[2:]]
    assert len(set(slender)) == 1
    assert slender[0] < 0.5 * rows["assistant"]["parameters"]
    for row in rows.values():
        assert 0 <= row["mean over exits"] <= 1
        if row["arm"] != "teacher":
            assert 1 <= row["blocks, easy"] <= 6 and 1 <= row["blocks, hard"] <= 6
            assert 0 <= row["at half of the blocks"] <= 1
            assert row["threshold"] >= 0
