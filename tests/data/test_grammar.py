from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.data.grammar import SentenceGrammar


def test_words_belong_to_one_class() -> None:
    grammar = SentenceGrammar()
    assert len(set(grammar.words)) == grammar.vocabulary == len(grammar.words)
    assert 100 <= grammar.vocabulary <= 130


def test_probabilities_are_those_of_the_draws() -> None:
    """The commonest sentences occur as often as they should, and all words and templates with their frequencies."""
    grammar = SentenceGrammar(seed=3, zipf=2.0)
    count = 40_000
    ids = grammar.sample(count, seed=1)
    logs = grammar.log_prob(ids)
    assert bool(logs.isfinite().all()) and grammar.grammaticality(ids) == 1.0
    seen = Counter(map(tuple, ids.tolist()))
    for sentence, times in seen.most_common(20):
        p = math.exp(float(grammar.log_prob(torch.tensor([sentence]))))
        assert abs(times / count - p) < 4 * math.sqrt(p * (1 - p) / count)
    deviation = float(logs.std()) / math.sqrt(count)
    assert abs(float(-logs.mean()) - grammar.entropy) < 4 * deviation


def test_probabilities_sum_to_one() -> None:
    """All sentences of the shortest template are enumerated; together they have its share."""
    grammar = SentenceGrammar(seed=1)
    first = {name: grammar.words.index(name) for name in ("a", "some", "dog", "dogs", "runs", "run")}
    total = 0.0
    for det, noun, verb in ((("a", 4), ("dog", 22), ("runs", 13)), (("some", 4), ("dogs", 22), ("run", 13))):
        grid = torch.cartesian_prod(
            *(torch.arange(first[name], first[name] + size) for name, size in (det, noun, verb))
        )
        ids = torch.zeros(len(grid), 14, dtype=torch.long)
        ids[:, :3] = grid
        total += float(grammar.log_prob(ids).exp().sum())
    assert total == pytest.approx(1 / sum(1 / rank for rank in range(1, 7)), rel=1e-12)


def test_grammar_is_strict() -> None:
    grammar = SentenceGrammar()
    number = {word: i for i, word in enumerate(grammar.words)}

    def ids(*rows: str) -> torch.Tensor:
        out = torch.zeros(len(rows), 14, dtype=torch.long)
        for row, text in zip(out, rows, strict=True):
            row[: len(text.split())] = torch.tensor([number[word] for word in text.split()])
        return out

    good = ids("a dog runs", "some old dogs near every cat sleep today", "every cat who many sad birds read sleeps")
    bad = ids("a dog run", "some dogs runs", "dog a runs", "a dog", "some old dogs near every cat sleeps today", "a dog runs <start>")  # fmt: skip
    assert grammar.grammaticality(good) == 1.0
    assert grammar.grammaticality(bad) == 0.0
    assert bool((grammar.log_prob(bad) == -torch.inf).all())
    late = ids("a dog runs")
    late[0, 5] = number["today"]  # words behind the padding
    assert grammar.grammaticality(late) == 0.0
    assert grammar.coverage(torch.cat([good, bad])) == {
        "templates": 3 / 6,
        "words": pytest.approx(
            len({w for row in grammar.decode(good) for w in row.split()}) / (grammar.vocabulary - 2)
        ),
    }
    assert grammar.coverage(bad) == {"templates": 0.0, "words": 0.0}
    assert grammar.decode(good)[0] == "a dog runs"


def test_seeds() -> None:
    grammar = SentenceGrammar(seed=5)
    assert torch.equal(grammar.sample(50, seed=2), SentenceGrammar(seed=5).sample(50, seed=2))
    assert not torch.equal(grammar.sample(50, seed=2), grammar.sample(50, seed=3))
    common = [SentenceGrammar(seed=s).sample(2000).flatten().bincount(minlength=111)[2:6].argmax() for s in range(6)]
    assert len({int(c) for c in common}) > 1
    even = SentenceGrammar(zipf=0.0)
    assert even.entropy > grammar.entropy
    assert SentenceGrammar(max_len=20).sample(3).shape == (3, 20)


def test_bad_input() -> None:
    grammar = SentenceGrammar()
    with pytest.raises(InputError, match="max_len: got 13, expected at least 14"):
        SentenceGrammar(max_len=13)
    with pytest.raises(InputError, match="zipf: got -1"):
        SentenceGrammar(zipf=-1)
    with pytest.raises(InputError, match="count: got 0"):
        grammar.sample(0)
    with pytest.raises(InputError, match=r"expected \(sentences, 14\)"):
        grammar.log_prob(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(InputError, match="expected 0 to 110"):
        grammar.grammaticality(torch.full((1, 14), 500))
