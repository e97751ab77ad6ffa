"""Utterances, their texts as ids, batches, and silence that is cut off."""

from __future__ import annotations

import pytest
import torch

from layerwright.data.spoken import Utterance, speech_batches, text_ids, trim_silence


def test_ids() -> None:
    ids, lengths = text_ids(["ab", "c b"], " abc")
    assert ids.tolist() == [[2, 3, 0], [4, 1, 3]] and lengths.tolist() == [2, 3]
    for texts, message in (([], "none"), (["a", ""], "empty"), (["az"], r"unknown symbols \['z'\]")):
        with pytest.raises(ValueError, match=message):
            text_ids(texts, " abc")


def test_batches() -> None:
    texts = ["a", "bb", "ccc", "ab", "c"]
    mels = [torch.full((n, 3), float(n)) for n in (4, 2, 6, 3, 5)]
    first, second, third = speech_batches(texts, mels, [0, 1, 2, 3, 4], "abc", 2)
    assert first.text.tolist() == [[1, 0], [2, 2]] and first.text_lengths.tolist() == [1, 2]
    assert first.mel.shape == (2, 4, 3) and first.mel_lengths.tolist() == [4, 2]
    assert not first.mel[1, 2:].any() and bool((first.mel[0] == 4).all())
    assert second.speaker.tolist() == [2, 3] and len(third.text) == 1
    mixed = speech_batches(texts, mels, [0, 1, 2, 3, 4], "abc", 5, torch.Generator().manual_seed(1))[0]
    assert mixed.speaker.tolist() != [0, 1, 2, 3, 4] and sorted(mixed.speaker.tolist()) == [0, 1, 2, 3, 4]
    lengths = dict(enumerate((4, 2, 6, 3, 5)))
    assert mixed.mel_lengths.tolist() == [lengths[k] for k in mixed.speaker.tolist()]
    with pytest.raises(ValueError, match="size: got 0"):
        speech_batches(texts, mels, [0] * 5, "abc", 0)
    with pytest.raises(ValueError, match="5 texts, 5 mels, 4 speakers"):
        speech_batches(texts, mels, [0] * 4, "abc", 2)


def test_silence() -> None:
    tone = torch.sin(torch.arange(8000) * 0.3)
    whole = torch.cat((torch.zeros(1600), tone, 1e-4 * torch.ones(3200)))
    kept = trim_silence(whole, 16_000)
    assert torch.equal(kept, tone)
    assert len(trim_silence(whole, 16_000, 120.0)) == 8000 + 3200
    assert Utterance(kept, 16_000, "a", "b").seconds == 0.5
    for bad in (torch.zeros(100), torch.zeros(2, 100), torch.zeros(0)):
        with pytest.raises(ValueError, match="samples: got shape"):
            trim_silence(bad, 16_000)
