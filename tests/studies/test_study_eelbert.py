from __future__ import annotations

import torch

from layerwright.studies._identifiers import CLASSES, LENGTH, MASK, PADDING, SPECIALS, START, UNKNOWN, identifiers
from layerwright.studies.eelbert import ARMS, masked_batches, run


def test_lines_and_words() -> None:
    data = identifiers(500, 300_000)
    assert len(set(data.strings)) == len(data.strings) and data.strings[: len(SPECIALS)] == SPECIALS
    assert data.closed == 500 + len(SPECIALS) < len(data.strings)
    assert int(data.train.ids[data.train.ids < data.closed].max()) == data.closed - 1
    assert not bool(torch.cat([data.train.ids, data.test.ids]).eq(UNKNOWN).any())
    counts = torch.bincount(data.train.ids.flatten(), minlength=len(data.strings))
    assert bool((counts[len(SPECIALS) : data.closed].diff() <= 0).all())  # by frequency
    assert int(counts[data.closed :].max()) <= int(counts[data.closed - 1])
    new = {int(i) for i in data.unseen.ids.unique() if counts[i] == 0}
    assert len(new) == data.unseen_words
    for lines in (data.train, data.test, data.unseen):
        assert lines.ids.shape == (len(lines), LENGTH) and bool((lines.ids[:, 0] == START).all())
        assert bool((lines.ids[:, 2] != PADDING).all())
        assert set(lines.labels.tolist()) == set(range(len(CLASSES)))
    assert bool((counts[data.unseen.ids] == 0).any(1).all()) and data.unseen_words > 300


def test_masks() -> None:
    data = identifiers(500, 300_000)
    batches = masked_batches(data.train, 30, data.closed, seed=1)
    again = masked_batches(data.train, 30, data.closed, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    given = torch.cat([batch["input_ids"][batch["chosen"]] for batch in batches])
    words = torch.cat([batch["words"] for batch in batches])
    assert len(SPECIALS) <= int(words.min()) <= int(words.max()) < data.closed and len(words) > 500
    assert abs(float((given == MASK).float().mean()) - 0.8) < 0.07
    assert abs(float((given == words).float().mean()) - 0.1) < 0.05


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "eelbert"
    rows = {row["arm"]: row for row in evidence.table}
    assert list(rows)[:4] == list(ARMS) and len(rows) == 5
    assert rows["n-gram hash"]["bytes"] == rows["whole-word hash"]["bytes"]
    gap = rows["n-gram hash"]["bytes"] - rows["table, equal size"]["bytes"]
    assert 0 <= gap < 4 * 48
    assert rows["table"]["bytes"] - rows["n-gram hash"]["bytes"] == 4 * 64 * identifiers(8000, 2_500_000).closed
    assert rows["n-gram hash"]["test"] > 0.305  # the most frequent statement is 0.303
    assert evidence.checks[0].holds and evidence.checks[-1].holds
