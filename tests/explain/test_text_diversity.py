from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.explain.text_diversity import (
    BleuReference,
    collapse_reason,
    corpus_bleu,
    diversity_against,
    reverse_nll,
    self_bleu,
    text_diversity,
)
from oracles import sadpgan as oracle

ORDERS = (1, 2, 3, 4, 5)
sentences = st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9), min_size=2, max_size=7)


def some(count: int, seed: int, words: str = "abcdefgh") -> list[list[str]]:
    draw = random.Random(seed)
    return [[draw.choice(words) for _ in range(draw.randint(1, 12))] for _ in range(count)]


@settings(deadline=None, max_examples=60)
@given(sentences, sentences)
def test_bleu_is_that_of_every_pair(samples: list[list[str]], reference: list[list[str]]) -> None:
    scores = BleuReference(reference, ORDERS).scores(samples)
    inside = BleuReference(samples, ORDERS).leave_one_out()
    for order in ORDERS:
        expected = [oracle.sentence_bleu(reference, sample, order) for sample in samples]
        assert scores[order].tolist() == pytest.approx(expected, abs=1e-12)
        assert inside[order].mean() == pytest.approx(oracle.self_bleu(samples, order), abs=1e-12)
    assert corpus_bleu(samples, reference)[3] == pytest.approx(scores[3].mean(), abs=1e-15)
    assert self_bleu(samples)[3] == pytest.approx(inside[3].mean(), abs=1e-15)


def test_bleu_is_that_of_nltk() -> None:
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    smoothing = bleu.SmoothingFunction().method1
    samples, reference = some(30, 0), some(40, 1)
    scores = BleuReference(reference, ORDERS).scores(samples)
    inside = BleuReference(samples, ORDERS).leave_one_out()
    for order in ORDERS:
        weights = (1 / order,) * order
        for number, sample in enumerate(samples):
            others = samples[:number] + samples[number + 1 :]
            for found, references in ((scores, reference), (inside, others)):
                peer = bleu.sentence_bleu(references, sample, weights, smoothing_function=smoothing)
                assert found[order][number] == pytest.approx(peer, abs=1e-12)


def test_ids_end_at_their_padding() -> None:
    samples, reference = some(20, 2), some(25, 3)
    number = {word: i + 1 for i, word in enumerate("abcdefgh")}

    def as_ids(rows: list[list[str]]) -> torch.Tensor:
        padded = torch.zeros(len(rows), 13, dtype=torch.long)
        for row, words in zip(padded, rows, strict=True):
            row[: len(words)] = torch.tensor([number[word] for word in words])
        return padded

    words, ids = text_diversity(samples, reference), text_diversity(as_ids(samples), as_ids(reference))
    assert words == pytest.approx(ids)
    after = as_ids(samples)
    ends = (after == 0).long().argmax(1)
    after[torch.arange(len(after)), ends + (ends < 12)] = 3  # what stands behind the first padding is not read
    after[torch.arange(len(after)), ends] = 0
    assert text_diversity(after, as_ids(reference)) == pytest.approx(ids)


def test_same_sentences_and_strange_ones() -> None:
    same = [list("abcdef")] * 5
    assert self_bleu(same) == pytest.approx(dict.fromkeys((2, 3, 4, 5), 1.0))
    strange = [list("abcdef"), list("ghijkl"), list("mnopqr")]
    assert self_bleu(strange) == dict.fromkeys((2, 3, 4, 5), 0.0)
    assert corpus_bleu(same, [list("abcdef")])[5] == pytest.approx(1.0)
    assert corpus_bleu([list("zzz")], [list("abc")])[2] == 0.0
    # "b c" has 1 of 2 words and none of 1 pair: sqrt(1/2 * 0.1/1), with lengths equal.
    assert corpus_bleu([["b", "c"]], [["a", "b"]], (2,))[2] == pytest.approx(math.sqrt(0.5 * 0.1))
    # One word of a reference of three: brevity exp(1 - 3).
    assert corpus_bleu([["a"]], [["a", "b", "c"]], (1,))[1] == pytest.approx(math.exp(-2))


@settings(deadline=None, max_examples=40)
@given(sentences, sentences, st.integers(1, 4))
def test_reverse_nll_is_that_of_dictionaries(samples: list[list[str]], reference: list[list[str]], order: int) -> None:
    count = len({word for sentence in samples + reference for word in sentence})
    expected = oracle.witten_bell_nll(samples, reference, order, count)
    assert reverse_nll(samples, reference, order) == pytest.approx(expected, rel=1e-9)
    assert reverse_nll(samples, reference, order, vocabulary=50) == pytest.approx(
        oracle.witten_bell_nll(samples, reference, order, 50), rel=1e-9
    )


def test_missing_modes_are_seen_backwards() -> None:
    reference = some(200, 4)
    whole = text_diversity(some(200, 5), reference)
    half = text_diversity([sentence for sentence in some(400, 5) if len(sentence) < 5], reference)
    few = text_diversity(some(4, 6) * 50, reference)
    assert half["reverse_nll"] > whole["reverse_nll"] + 0.05
    assert few["reverse_nll"] > whole["reverse_nll"] + 0.5
    assert few["backward_bleu_3"] < whole["backward_bleu_3"] - 0.2
    assert few["self_bleu_3"] == pytest.approx(1.0) and few["unique_share"] == 4 / 200
    assert whole["self_bleu_3"] < 0.95


def test_counts_of_a_small_text() -> None:
    values = text_diversity([["a", "b"], ["a", "b"], ["b"], []], [["a"]])
    assert values["distinct_1"] == 2 / 5 and values["distinct_2"] == 1 / 2
    assert values["unique_share"] == 3 / 4 and values["empty_share"] == 1 / 4
    assert values["word_entropy"] == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)))
    nothing = text_diversity([[], []], [["a"]])
    assert nothing["bleu_2"] == nothing["self_bleu_2"] == nothing["distinct_1"] == nothing["word_entropy"] == 0.0
    assert diversity_against([["a"]])([["a", "b"], ["a", "b"], ["b"], []]) == values


def test_collapse() -> None:
    assert collapse_reason({"unique_share": 0.5, "self_bleu_3": 0.7, "nll_div": 0.5}) is None
    assert collapse_reason({}) is None
    assert collapse_reason({"unique_share": 0.05, "self_bleu_3": 0.95, "nll_div": 0.1}) is None
    for values, word in (
        ({"unique_share": 0.049}, "different sentences"),
        ({"self_bleu_3": 0.951}, "self-BLEU-3"),
        ({"nll_div": 0.099}, "nats"),
    ):
        assert word in (collapse_reason(values) or "")
    assert collapse_reason({"unique_share": 0.4}, unique_share=0.5)
    collapsed = text_diversity([list("abcdef")] * 100, [list("abc")])
    assert collapse_reason(collapsed)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="got 1 sentence, expected at least 2"):
        self_bleu([["a"]])
    with pytest.raises(InputError, match="references: sentence 1 is empty"):
        corpus_bleu([["a"]], [["a"], []])
    with pytest.raises(InputError, match="hypotheses: a sentence is empty"):
        corpus_bleu([[]], [["a"]])
    with pytest.raises(InputError, match="references: sentence 0 is empty"):
        self_bleu(torch.tensor([[0, 1], [1, 2]]))
    with pytest.raises(InputError, match="hypotheses: got no sentences"):
        corpus_bleu([], [["a"]])
    with pytest.raises(InputError, match="orders"):
        corpus_bleu([["a"]], [["a"]], (0, 2))
    with pytest.raises(InputError, match="empty: got 'skip'"):
        corpus_bleu([["a"]], [["a"]], empty="skip")
    with pytest.raises(InputError, match="order: got 0"):
        reverse_nll([["a"]], [["a"]], 0)
    with pytest.raises(InputError, match="expected ids"):
        self_bleu(torch.rand(3, 4))
    assert corpus_bleu([["a"], []], [["a"]], (1,), empty="zero")[1] == 0.5
