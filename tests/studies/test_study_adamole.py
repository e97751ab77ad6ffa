from __future__ import annotations

import math

import pytest
import torch

from layerwright.studies.adamole import ARMS, LENGTH, TASKS, examples, mutual_information, run


def test_prompts_carry_their_answers() -> None:
    rows, tags = examples(8, seed=3)
    texts = [bytes(row.tolist()).decode() for row in rows]
    assert tags.tolist() == [0, 1, 2, 3] * 2
    for text, tag in zip(texts, tags.tolist(), strict=True):
        prompt, _, answer = text.partition(">")
        name, _, given = prompt.partition(":")
        assert name == list(TASKS)[tag]
        assert answer.rstrip("\n") == TASKS[name](given)
        assert len(answer) == LENGTH
    assert [TASKS[name]("acdb") for name in "rens"] == ["bdca", "ad", "bdec", "abcd"]
    assert torch.equal(examples(8, seed=3)[0], rows)
    assert not torch.equal(examples(8, seed=4)[0], rows)


def test_mutual_information() -> None:
    first = torch.tensor([0, 0, 1, 1])
    assert mutual_information(first, 1 - first) == pytest.approx(math.log(2))
    assert mutual_information(first, torch.tensor([0, 1, 0, 1])) == pytest.approx(0, abs=1e-12)


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "adamole"
    assert [row["arm"] for row in evidence.table] == [arm.name for arm in ARMS] * 2
    rows = {row["arm"]: row for row in evidence.table}
    assert rows["LoRA"]["active"] == 1
    assert rows["top-2"]["active"] == pytest.approx(2)
    assert 1 <= rows["AdaMoLE"]["active"] <= 8
    assert [check.holds for check in evidence.checks][2:5] == [True] * 3
