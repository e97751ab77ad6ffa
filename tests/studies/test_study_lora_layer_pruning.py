"""The quick form runs and measures; the generated reports are what they say."""

from __future__ import annotations

from itertools import pairwise

import torch

from layerwright.studies._reports import (
    EOS,
    FIRST_KEY,
    FIRST_VALUE,
    KEYS,
    MASK,
    PAD,
    VALUES,
    denoising,
    reports,
    summaries,
    summary_f1,
)
from layerwright.studies.lora_layer_pruning import report_model, run


def test_a_summary_names_the_abnormal_findings_in_order() -> None:
    texts, goals = reports(50, seed=3)
    for text, goal in zip(texts.tolist(), goals.tolist(), strict=True):
        found = {a - FIRST_KEY: b for a, b in pairwise(text) if FIRST_KEY <= a < FIRST_VALUE}
        assert len(found) == KEYS
        expected: list[int] = []
        for key in range(KEYS):
            value = found[key] - FIRST_VALUE - key * VALUES
            assert 0 <= value < VALUES
            expected += [key + FIRST_KEY, found[key]] if value >= VALUES // 2 else []
        end = goal.index(EOS)
        assert goal[:end] == expected
        assert set(goal[end + 1 :]) <= {PAD}
        assert text.count(EOS) == 1
    assert torch.equal(reports(50, seed=3)[0], texts)


def test_denoising_hides_words_and_asks_for_all() -> None:
    batch = next(iter(denoising(16, seed=3)))
    text, _ = reports(16, seed=3)
    seen = batch["input_ids"]
    hidden = seen == MASK
    assert 0.1 < float(hidden.float().mean()) < 0.4
    assert torch.equal(seen[~hidden], text[~hidden])
    labels = batch["labels"]
    assert torch.equal(labels[labels != -100], text[:, 1:][text[:, 1:] != PAD])
    assert next(iter(summaries(4, seed=1)))["labels"].shape == (4, 2 * KEYS + 1)


def test_f1_of_a_model_that_says_nothing_right_is_low() -> None:
    assert summary_f1(report_model(30), 10, seed=5) < 0.3


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert len(evidence.checks) == 7
    by_name = {check.name: check for check in evidence.checks}
    assert by_name["trained parameters less (in + out) x rank of the feed-forward layers"].holds
    assert by_name["trained share of the parameters"].holds
    assert by_name["saved activations over those with all blocks"].holds
    assert len(evidence.table) == 8
