from __future__ import annotations

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.studies._passkey import DEFINE, QUERY, RECORD, VALUE, dictionary, passkey_prompt
from layerwright.studies.focused_transformer import ALONE, FOCUSED, PLAIN, memory_model, recall, run, train_recall


def test_records() -> None:
    made = dictionary(5, 8, seed=1)
    assert made.definitions.shape == made.queries.shape == (5, 48)
    told = made.definitions.view(-1, RECORD)
    asked = made.queries.view(-1, RECORD)
    assert bool((told[:, 0] == DEFINE).all() and (asked[:, 0] == QUERY).all() and (told[:, 4] == VALUE).all())
    assert len({tuple(row[1:4]) for row in told.tolist()}) == 40
    for document in range(5):
        known = {tuple(row[1:4]): row[5] for row in told.view(5, 8, RECORD)[document].tolist()}
        for row in asked.view(5, 8, RECORD)[document].tolist():
            assert known[tuple(row[1:4])] == row[5]
    assert made.answers.nonzero().flatten().tolist() == list(range(5, 48, 6))
    assert not torch.equal(told[:, 1:], asked[:, 1:])
    assert torch.equal(dictionary(5, 8, 1).queries, made.queries)
    assert not torch.equal(dictionary(5, 8, 2).queries, made.queries)
    with pytest.raises(InputError, match="records: got 40000"):
        dictionary(5000, 8, 0)


@pytest.mark.parametrize("position", [0.0, 0.4, 1.0])
def test_pass_key(position: float) -> None:
    prompt, answer = passkey_prompt(1000, 4711, position, seed=3)
    assert len(prompt) == 1000
    assert answer == b"4711"
    assert prompt.count(b"4711") == 2
    assert prompt.endswith(b"the pass key is ")
    assert abs(prompt.index(b" the pass key is 4711") / 1000 - position) < 0.12
    with pytest.raises(InputError, match="length: got 20"):
        passkey_prompt(20, 1, 0.5)
    with pytest.raises(InputError, match=r"position: got 1\.5"):
        passkey_prompt(500, 1, 1.5)


def test_contexts_rise_when_the_answers_are_known() -> None:
    handle = memory_model(0)
    from layerwright.studies import focused_transformer as study

    assert train_recall(handle.model, handle, 3, 3, seed=0)[1] is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "KNOWN", 0.0)
        patch.setattr(study, "RECENT", 2)
        shares, switched = train_recall(handle.model, handle, 3, 4, seed=0)
    assert len(shares) == 4
    assert switched == 2
    assert all(0 <= share <= 1 for share in shares)
    assert recall(handle.model, handle, 3, 2, seed=5) == recall(handle.model, handle, 3, 2, seed=5)
    assert handle.held == 0


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "focused-transformer"
    rows = {row["arm"]: row for row in evidence.table}
    assert list(rows) == [ALONE, FOCUSED, PLAIN]
    for row in rows.values():
        assert 0 <= row["accuracy, 4"] <= 1
        assert row["switched"] is None
    assert 0 < rows[ALONE]["r_16"] < 1
    assert "r_16" not in rows[PLAIN]
    assert not evidence.checks[0].holds  # six steps teach nothing, and the study says so
    assert evidence.verdict == "does not hold"
