"""The study of speech for a voice with few recordings."""

from __future__ import annotations

import math

import pytest
import torch

from layerwright.models.tacotron2 import Tacotron2, TacotronConfig
from layerwright.studies import _tdass
from layerwright.studies._tdass import SYMBOLS, VOICES, WORDS, corpus, pooled_memory, probe_share
from layerwright.studies.tdass import OURS, USUAL, run, train_arm

GENERATED: _tdass.Source = "source and filters"


@pytest.fixture(autouse=True)
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same everywhere, whether espeak-ng is installed or not."""
    monkeypatch.setattr(_tdass.shutil, "which", lambda _name: None)
    corpus.cache_clear()


def test_parts_share_no_phrase() -> None:
    assert len(set(WORDS)) == 40 and set("".join(WORDS)) | {" "} <= set(SYMBOLS)
    data = corpus(3, 4, 8, 3, 0)
    assert data.source == GENERATED
    assert torch.tensor(data.train.speakers).bincount().tolist() == [3, 4, 4, 4, 4]
    assert set(data.test.speakers) == {0} and len(data.test.texts) == 8
    assert torch.tensor(data.others.speakers).bincount().tolist() == [0, 2, 2, 2, 2]
    assert torch.tensor(data.listen_test.speakers).bincount().tolist() == [1] * 5
    parts = [set(part.texts) for part in (data.train, data.test, data.others, data.listen, data.listen_test)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 19 + 8 + 8 + 15 + 5
    assert all(2 <= len(text.split()) <= 3 and set(text.split()) <= set(WORDS) for text in set().union(*parts))
    every = torch.cat(data.train.mels)
    assert torch.allclose(every.mean(0), torch.zeros(40), atol=1e-4)
    assert torch.allclose(every.std(0), torch.ones(40), atol=1e-3)
    assert torch.allclose(data.logarithms(torch.zeros(1, 40))[0], data.mean)
    assert not torch.equal(corpus(3, 4, 8, 3, 1).train.mels[0][:5], data.train.mels[0][:5])


def test_batches_of_like_lengths_hold_everything_once() -> None:
    data = corpus(3, 4, 8, 3, 0).train
    batches = data.batches(4, 0)
    frames = torch.cat([batch.mel_lengths for batch in batches])
    assert sorted(frames.tolist()) == sorted(len(mel) for mel in data.mels)
    padded = sum(batch.mel.shape[0] * batch.mel.shape[1] for batch in batches)
    plain = sum(batch.mel.shape[0] * batch.mel.shape[1] for batch in data.batches(4))
    assert padded < plain


def test_probe_finds_what_is_there_and_nothing_else() -> None:
    """Voices that differ are told apart; with one embedding for all, some of the others pass for the target."""
    data = corpus(12, 15, 20, 3, 0)
    model = Tacotron2(TacotronConfig.small(len(SYMBOLS)), VOICES).eval()
    assert pooled_memory(model, data.others).shape == (20, 64)
    assert probe_share(model, data, decay=1.0) == 0
    with torch.no_grad():
        model.speakers.weight.copy_(model.speakers.weight[:1].expand(VOICES, -1))
    assert probe_share(model, data, decay=1.0) >= 0.1


def test_both_arms_begin_alike_and_the_usual_one_is_the_network_alone() -> None:
    data = corpus(3, 4, 8, 3, 0)
    usual, _ = train_arm(data, USUAL, 2, 0)
    ours, _ = train_arm(data, OURS, 2, 0)
    # Lambda is 0 in the first step and Adam's first steps are of equal size; two steps differ a little.
    assert torch.allclose(usual.fusion.weight, ours.fusion.weight, atol=0.02)
    assert not torch.equal(usual.fusion.weight, ours.fusion.weight)


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "tdass" and evidence.seeds == (0,)
    assert [row["arm"] for row in evidence.table] == ["the voice itself", USUAL, OURS]
    truth, usual, ours = evidence.table
    accuracy, likely, distance, probe = evidence.checks
    assert accuracy.measured == truth["listener's accuracy"] and accuracy.relation == ">=" and accuracy.bound == 0.98
    assert accuracy.measured >= 0.9 and truth["target probability"] > 0.8
    assert likely.measured == ours["target probability"] and likely.relation == ">="
    assert likely.bound == pytest.approx(usual["target probability"] - 0.02)
    assert distance.measured == ours["MCD, dB"] and distance.relation == "<="
    assert distance.bound == pytest.approx(usual["MCD, dB"] + 0.2)
    assert probe.relation == ">=" and probe.measured == ours["others called target by a fresh probe"]
    assert probe.bound == pytest.approx(usual["others called target by a fresh probe"] + 0.15)
    assert all(math.isfinite(row["MCD, dB"]) and 0 < row["MCD, dB"] < 40 for row in (usual, ours))
    assert any("source and filters" in note for note in evidence.notes)
    change = ours["target probability"] - usual["target probability"]
    assert any(f"{change:+.3f} (target probability)" in note for note in evidence.notes)
    assert any("quick form" in note for note in evidence.notes)
