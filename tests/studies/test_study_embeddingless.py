from __future__ import annotations

import math

import pytest
import torch

from layerwright.data.byte_codec import ByteCodec
from layerwright.models.byte_seq2seq import ByteSeq2Seq
from layerwright.studies._number_words import byte_batch, date_pair, number_in_words, pairs, pseudo_words
from layerwright.studies.embeddingless import ARMS, run, smoothed_loss


def test_words_and_dates() -> None:
    expected = {
        0: "zero",
        17: "seventeen",
        40: "forty",
        85: "eighty five",
        300: "three hundred",
        704: "seven hundred and four",
    }
    assert {number: number_in_words(number) for number in expected} == expected
    assert len({number_in_words(number) for number in range(1000)}) == 1000
    assert date_pair(3, 5, 84) == ("3 may 84", "84-05-03")
    words = pseudo_words()
    assert len(set(words)) == 400 and all(3 <= len(word) <= 5 for word in words)


def test_parts_share_no_source() -> None:
    train, test = pairs(3000, "train"), pairs(300, "test", seed=1)
    assert not {source for source, _ in train} & {source for source, _ in test}
    assert len({source for source, _ in test}) == 300
    assert train == pairs(3000, "train") != pairs(3000, "train", seed=1)
    targets = dict(train + test)
    assert all(
        targets[source].endswith("es") for source in targets if source.startswith("many ") and source[-1] in "sxz"
    )
    swapped = [source for source in targets if source.startswith("swap ")]
    assert swapped and all(targets[s].split() == s.split()[:0:-1] for s in swapped)


def test_batches_and_loss() -> None:
    codec = ByteCodec()
    batch = byte_batch([("one", "1"), ("twenty", "20")], codec)
    assert batch["src"].tolist()[0] == [*b"one", 258, 256, 256, 256]
    assert batch["tgt_in"].tolist() == [[257, 49, 256], [257, 50, 48]]
    assert batch["labels"].tolist() == [[49, 258, -100], [50, 48, 258]]
    model = ByteSeq2Seq(264, 1, 1, 4, 16, dropout=0.0)
    with torch.no_grad():
        logits = model(batch["src"], batch["tgt_in"]).log_softmax(-1)
        total = 0.0
        for row, labels in zip(logits, batch["labels"].tolist(), strict=True):
            for scores, label in zip(row, labels, strict=True):
                if label >= 0:
                    total -= 0.9 * float(scores[label]) + 0.1 * float(scores.mean())
        assert float(smoothed_loss(model, batch)) == pytest.approx(total / 5, rel=1e-4)


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "embeddingless"
    rows = {row["arm"]: row for row in evidence.table}
    assert list(rows) == list(ARMS)
    assert rows["embeddings"]["parameters"] - rows["embeddingless"]["parameters"] == 2 * 259 * 264 - 3
    assert all(0 < row["CER"] < 20 and 0 <= row["exact"] <= 1 and row["loss"] < 20 for row in rows.values())
    assert rows["embeddings"]["loss"] < math.log(259)  # less than by chance
    assert len({row["loss"] for row in rows.values()}) == 4
    assert len(evidence.checks) == 2 and evidence.checks[1].bound >= 0.01
