from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.data.stdlib import stdlib_text
from layerwright.nn.ngram_embedding import NGramHashEmbedding, ngram_signatures, vocabulary_of
from layerwright.nn.replace import module_from_spec

PRIME = 2**31 - 1
STEMS = [
    "walk",
    "talk",
    "jump",
    "play",
    "look",
    "work",
    "help",
    "call",
    "open",
    "turn",
    "start",
    "clean",
    "paint",
    "visit",
    "watch",
    "learn",
    "cook",
    "climb",
    "point",
    "print",
    "count",
    "answer",
    "listen",
    "follow",
    "happen",
    "remember",
    "consider",
    "develop",
    "explain",
    "return",
    "deliver",
    "enter",
    "gather",
    "wonder",
    "order",
    "offer",
    "finish",
    "push",
    "wash",
    "brush",
    "reach",
    "touch",
    "search",
    "teach",
    "march",
    "pack",
    "lock",
    "pick",
    "kick",
    "bark",
]
METHODS: list[dict[str, Any]] = [
    {},
    {"combine": "split"},
    {"method": "token"},
    {"method": "random"},
    {"method": "onehot"},
    {"orders": (2, 4)},
]


@cache
def words(count: int = 600) -> list[str]:
    seen = dict.fromkeys("".join(c if c.isalnum() else " " for c in stdlib_text("heldout", 200_000)[0]).split())
    seen |= {f"##{stem}": None for stem in STEMS}
    return ["[PAD]", "[UNK]", *list(seen)[: count - 2]]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


@given(st.text(min_size=1, max_size=30), st.sampled_from([(257, PRIME), (31, 101), (65_599, 999_983)]))
def test_rolling_hash_is_the_polynomial(token: str, numbers: tuple[int, int]) -> None:
    base, prime = numbers
    direct = [
        [sum(ord(token[i + k]) * base ** (n - 1 - k) for k in range(n)) % prime for i in range(len(token) - n + 1)]
        for n in (1, 2, 3, 5)
    ]
    assert ngram_signatures(token, (1, 2, 3, 5), base, prime) == direct


def oracle(embedding: NGramHashEmbedding, token: str) -> list[float]:
    """Loops over n-grams and components in exact fractions, rounded at the end."""
    part = len(embedding.orders) if embedding.combine == "split" else 1
    width = embedding.dim // part
    values: list[float] = []
    for column in range(embedding.dim):
        orders = embedding.orders if part == 1 else (embedding.orders[column // width],)
        found = [s for group in ngram_signatures(token, orders) for s in group]
        found = found or ngram_signatures(token, (len(token),))[0]
        a, b = int(embedding.factors[column]), int(embedding.summands[column])
        total = sum(2 * ((a * s + b) % PRIME) - (PRIME - 1) for s in found)
        values.append(total * embedding.std / (len(found) * (PRIME**2 - 1) / 3) ** 0.5)
    return values


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6), st.sampled_from(["mean", "split"]))
def test_against_loops(tokens: list[str], combine: Any) -> None:
    embedding = NGramHashEmbedding(["a"], 6, combine=combine, seed=3)
    expected = torch.tensor([oracle(embedding, token) for token in tokens], dtype=torch.float64)
    torch.testing.assert_close(embedding.embed_strings(tokens).double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", METHODS)
def test_materialised_equals_on_the_fly_bitwise(kind: dict[str, Any], dtype: torch.dtype) -> None:
    vocabulary = words()
    table, fly = (NGramHashEmbedding(vocabulary, 24, materialize=m, **kind).to(dtype) for m in (True, False))
    ids = torch.randint(len(vocabulary), (5, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(table(ids), fly(ids))
    assert table.table is not None and fly.table is None
    assert table(ids).dtype == dtype
    assert torch.equal(table.weight, fly(torch.arange(len(vocabulary))))
    if kind.get("method") != "random":
        assert torch.equal(fly.embed_strings(vocabulary[5:9]), fly(torch.arange(5, 9)))


def test_table_in_small_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = NGramHashEmbedding(words(), 8).weight
    monkeypatch.setattr("layerwright.nn.ngram_embedding._CHUNK_BYTES", 1000)
    assert torch.equal(NGramHashEmbedding(words(), 8).weight, whole)


def test_auto_keeps_to_the_budget() -> None:
    small, large = (NGramHashEmbedding(words(100), 8, budget_bytes=b) for b in (100 * 8 * 4 - 1, 100 * 8 * 4))
    for embedding in (small, large):
        embedding(torch.tensor([1]))
    assert small.table is None and large.table is not None


def test_same_bits_in_other_processes() -> None:
    code = (
        "import hashlib; from layerwright.nn.ngram_embedding import NGramHashEmbedding as E; "
        "w = E(['walk', '##ing', '[PAD]', 'h\\u00e9'], 12, seed=7).weight; "
        "print(hashlib.sha256(w.numpy().tobytes()).hexdigest())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for salt in ("1", "2")
    }
    here = NGramHashEmbedding(["walk", "##ing", "[PAD]", "hé"], 12, seed=7).weight
    assert printed == {hashlib.sha256(here.numpy().tobytes()).hexdigest()}


def test_a_golden_vector() -> None:
    vector = NGramHashEmbedding(["walk"], 4, std=1.0).weight[0]
    torch.testing.assert_close(vector, torch.tensor([0.0376160, -0.2427911, -0.4383909, -0.0607399]))
    assert not torch.equal(vector, NGramHashEmbedding(["walk"], 4, std=1.0, seed=1).weight[0])


def test_strangers_are_nearly_orthogonal() -> None:
    embedding = NGramHashEmbedding(["a"], 256)
    left = embedding.embed_strings([f"{a}{b}{c}" for a in "abcd" for b in "efgh" for c in "ijkl"])
    right = embedding.embed_strings([f"{a}{b}{c}" for a in "mnop" for b in "qrst" for c in "uvwx"])
    near = cosine(left, right).abs() < 4 / 256**0.5
    assert float(near.float().mean()) > 0.97


@pytest.mark.parametrize("combine", ["mean", "split"])
def test_inflected_forms_are_close(combine: Any) -> None:
    embedding = NGramHashEmbedding(["a"], 126, combine=combine)
    stems, forms = embedding.embed_strings(STEMS), embedding.embed_strings([f"{stem}ed" for stem in STEMS])
    zebra = embedding.embed_strings(["zebra"])
    assert len(STEMS) == 50
    assert float((cosine(stems, forms) > cosine(stems, zebra)).float().mean()) >= 0.95
    token = NGramHashEmbedding(["a"], 126, method="token")
    gap = cosine(token.embed_strings(["walk"]), token.embed_strings(["walked"]))
    assert float(gap.abs()) < 0.4


@pytest.mark.parametrize("kind", METHODS)
def test_mean_and_deviation(kind: dict[str, Any]) -> None:
    weight = NGramHashEmbedding(words(), 120, std=0.05, **kind).weight
    assert float(weight.std()) == pytest.approx(0.05, rel=0.1)
    assert abs(float(weight.mean())) < 0.05 * 0.1


def test_permuting_the_vocabulary_permutes_rows() -> None:
    vocabulary = words(100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    moved = NGramHashEmbedding([vocabulary[i] for i in order], 16)
    assert torch.equal(moved.weight, NGramHashEmbedding(vocabulary, 16).weight[order])


def test_other_strings() -> None:
    embedding = NGramHashEmbedding(["a", "b"], 6, seed=3, learn_scale=True)
    longer = embedding.with_vocabulary(["b", "cab", "a"])
    assert torch.equal(longer.weight[[2, 0]], embedding.weight)
    assert torch.equal(longer.weight, embedding.embed_strings(["b", "cab", "a"]))
    assert longer.scale is embedding.scale and embedding.vocabulary == ("a", "b")


def test_nothing_of_the_vocabularys_size_is_saved_or_trained() -> None:
    embedding = NGramHashEmbedding(words(), 16, materialize=True)
    embedding(torch.tensor([0]))
    assert embedding.state_dict() == {} and list(embedding.parameters()) == []
    learned = NGramHashEmbedding(words(), 16, learn_scale=True, project_to=5)
    assert {name: tuple(t.shape) for name, t in learned.state_dict().items()} == {
        "scale": (),
        "projection.weight": (5, 16),
        "projection.bias": (5,),
    }
    learned(torch.tensor([[1, 2]])).square().sum().backward()
    assert learned.scale is not None and learned.scale.grad is not None and bool(learned.scale.grad != 0)


@pytest.mark.parametrize("kind", [*METHODS, {"learn_scale": True, "project_to": 6}])
def test_spec_there_and_back(kind: dict[str, Any]) -> None:
    embedding = NGramHashEmbedding(words(60), 12, seed=5, **kind).bfloat16()
    with torch.device("meta"):
        other = module_from_spec(embedding.spec())
    assert isinstance(other, NGramHashEmbedding)
    other.load_state_dict(embedding.state_dict(), assign=True)
    assert other.spec() == embedding.spec()
    ids = torch.arange(60).view(6, 10)
    assert torch.equal(other(ids), embedding(ids)) and other(ids).shape == (6, 10, embedding.embedding_dim)


def test_table_follows_dtype() -> None:
    embedding = NGramHashEmbedding(words(60), 12, materialize=True)
    ids = torch.arange(60)
    before = embedding(ids)
    assert embedding.bfloat16()(ids).dtype == torch.bfloat16
    assert torch.equal(embedding.float()(ids), before)
    with torch.inference_mode():
        NGramHashEmbedding(words(60), 12, materialize=True)(ids)


def test_collisions() -> None:
    vocabulary = words()
    assert NGramHashEmbedding(vocabulary, 8).collision_rate() < 1e-3
    distinct = {t[i : i + n] for t in vocabulary for n in (1, 2, 3) for i in range(len(t) - n + 1)}
    signatures = {s for gram in distinct for s in ngram_signatures(gram, (len(gram),), 31, 101)[0]}
    rate = NGramHashEmbedding(vocabulary, 8, base=31, modulus=101).collision_rate()
    assert rate == pytest.approx(1 - len(signatures) / len(distinct))


def test_vocabulary_of_a_tokenizer() -> None:
    class Tokenizer:
        def __init__(self, names: dict[str, int]) -> None:
            self.names = names

        def get_vocab(self) -> dict[str, int]:
            return self.names

    assert vocabulary_of(Tokenizer({"b": 1, "a": 0})) == ("a", "b")
    with pytest.raises(InputError, match="no string for id 1"):
        vocabulary_of(Tokenizer({"b": 2, "a": 0}))
    with pytest.raises(InputError, match="no string for id 0"):
        vocabulary_of(Tokenizer({}))
    with pytest.raises(InputError, match="got no strings"):
        vocabulary_of([])
    for wrong in ("text", 3):
        with pytest.raises(TypeError, match="vocabulary"):
            vocabulary_of(wrong)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"orders": ()}, "orders: got"),
        ({"orders": (0, 2)}, "at least 1"),
        ({"orders": (2, 2)}, "each length once"),
        ({"combine": "split", "orders": (1, 2, 3, 4, 5)}, "divisible"),
        ({"combine": "split", "method": "token"}, "split needs"),
        ({"combine": "sum"}, "combine"),
        ({"method": "ngram"}, "did you mean ngrams"),
        ({"modulus": 2**31}, "below 2\\^31"),
        ({"modulus": 1000}, "not prime"),
        ({"base": 1}, "base: got 1"),
        ({"base": 2**31}, "base: got"),
        ({"std": 0.0}, "std: got 0"),
        ({"materialize": "yes"}, "materialize"),
        ({"project_to": 0}, "project_to 0"),
        ({"dim": 0}, "dim: got 0"),
    ],
)
def test_bad_settings(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NGramHashEmbedding(**{"vocabulary": ["a", "b"], "dim": 12} | settings_)


def test_bad_strings_and_ids() -> None:
    with pytest.raises(InputError, match="number 1 is empty"):
        NGramHashEmbedding(["a", ""], 4)
    with pytest.raises(InputError, match="empty"):
        ngram_signatures("")
    with pytest.raises(TypeError, match="number 0 is a int"):
        NGramHashEmbedding([3], 4)
    embedding = NGramHashEmbedding(["a", "b"], 4)
    for wrong in ([2], [-1]):
        with pytest.raises(InputError, match="expected 0 to 1"):
            embedding(torch.tensor(wrong))
    with pytest.raises(TypeError, match="whole numbers"):
        embedding(torch.tensor([0.5]))
    with pytest.raises(TypeError, match="one string"):
        embedding.embed_strings("ab")
    with pytest.raises(InputError, match="belong to ids"):
        NGramHashEmbedding(["a", "b"], 4, method="random").embed_strings(["c"])
