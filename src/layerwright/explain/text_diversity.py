"""How good and how varied generated sentences are, and whether a generator has collapsed to a few of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import numpy

from layerwright.core.errors import InputError
from layerwright.explain._bleu import BleuReference, Orders, corpus_bleu, self_bleu
from layerwright.explain._sentence_ngrams import Ids, Ngrams, Sentences, read_sentences

__all__ = [
    "BleuReference",
    "collapse_reason",
    "corpus_bleu",
    "diversity_against",
    "reverse_nll",
    "self_bleu",
    "text_diversity",
]


def reverse_nll(
    samples: Sentences, reference: Sentences, order: int = 3, *, pad_id: int | None = 0, vocabulary: int | None = None
) -> float:
    """Nats of a word of `reference`, ends of sentences included, under an n-gram model of `samples`: high where modes are missing.

    Interpolated as by Witten and Bell, 1991, down to equal chances: ``p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h))``
    with ``T(h)`` different words after `h`. Its exponential is the reverse perplexity.

    Args:
        samples, reference: ids ``(sentences, tokens)`` padded with `pad_id`, or sentences of words.
        order: words of an n-gram, at least 1.
        pad_id: ends a sentence of ids.
        vocabulary: words that could occur; None for those that do in either.

    Raises:
        InputError: no sentences or an order below 1.
    """
    if order < 1:
        raise InputError(f"order: got {order}, expected at least 1")
    words: dict[Hashable, int] = {object(): 0, object(): 1}  # before a sentence, and after it
    mine, real = (
        [numpy.concatenate([numpy.zeros(order - 1, dtype=numpy.int64), sentence, [1]]) for sentence in read]
        for read in (
            read_sentences(samples, words, pad_id, "samples"),
            read_sentences(reference, words, pad_id, "reference"),
        )
    )
    model = Ngrams.of(mine, len(words), order)
    contexts, grams = _histories(list(zip(model.owners, model.numbers, strict=True)), model.lengths, order)
    found, lengths = model.look_up(real)
    own_contexts, own_grams = _histories(found, lengths, order)
    p = numpy.full(len(own_grams[0]), 1.0 / (max(vocabulary or 0, len(words) - 2) + 1))
    for size, (context, gram) in enumerate(zip(own_contexts, own_grams, strict=True)):
        table = model.tables[size]
        both = numpy.bincount(grams[size], minlength=len(table))
        width = int(contexts[size].max()) + 1
        alone = numpy.bincount(contexts[size], minlength=width)
        followers = numpy.bincount((table // model.vocabulary)[both > 0], minlength=width)
        known = (context >= 0) & (context < width)
        known[known] = alone[context[known]] > 0
        count = numpy.where(gram >= 0, both[numpy.maximum(gram, 0)], 0)[known]
        different = followers[context[known]]
        p[known] = (count + different * p[known]) / (alone[context[known]] + different)
    return float(-numpy.log(p).mean())


def _histories(found: list[tuple[Ids, Ids]], lengths: Ids, order: int) -> tuple[list[Ids], list[Ids]]:
    """For each word to predict and each length: the number of the words before it, and of those with it; -1 for unknown."""
    total = int(lengths.sum())
    within = numpy.arange(total) - numpy.repeat(numpy.cumsum(lengths) - lengths, lengths)
    scored = within >= order - 1
    ending: list[Ids] = [numpy.zeros(total, dtype=numpy.int64)]
    for size, (_, numbers) in enumerate(found, 1):
        ends = numpy.full(total, -1, dtype=numpy.int64)
        ends[within >= size - 1] = numbers
        ending.append(ends)
    contexts = [numpy.concatenate([[0], ends[:-1]])[scored] for ends in ending[:-1]]
    return contexts, [ends[scored] for ends in ending[1:]]


def text_diversity(
    samples: Sentences, reference: Sentences, orders: Orders = (2, 3, 4, 5), *, pad_id: int | None = 0
) -> dict[str, float]:
    """Quality and variety of `samples` beside real sentences, by name; empty samples match nothing.

    `bleu_n`: against `reference`, higher is better; `backward_bleu_n`: of the reference against samples, low where modes are
    missing; `self_bleu_n`: of each sample against the others, lower is more varied; `distinct_1`, `distinct_2`: different
    n-grams over all; `unique_share`: different sentences over all; `empty_share`; `word_entropy`: nats, of the words'
    frequencies; `reverse_nll`: see `reverse_nll`.

    Raises:
        InputError: fewer than two samples, no reference or an empty one, an order below 1.
    """
    return diversity_against(reference, orders, pad_id=pad_id)(samples)


def diversity_against(
    reference: Sentences, orders: Orders = (2, 3, 4, 5), *, pad_id: int | None = 0
) -> Callable[[Sentences], dict[str, float]]:
    """`text_diversity` with the reference counted once: what `train_dpgan` takes as `evaluate`."""
    real = BleuReference(reference, orders, pad_id=pad_id)

    def measure(samples: Sentences) -> dict[str, float]:
        own = BleuReference(samples, orders, pad_id=pad_id, empty="zero")
        rows = read_sentences(samples, {}, pad_id, "samples")
        values: dict[str, float] = {}
        forward = real.scores(samples, empty="zero")
        kinds = {"bleu": forward, "backward_bleu": own.scores(reference), "self_bleu": own.leave_one_out()}
        for kind, scores in kinds.items():
            values |= {f"{kind}_{order}": float(found.mean()) for order, found in scores.items()}
        ngrams = Ngrams.of(rows, max(1, 1 + max((int(row.max()) for row in rows if len(row)), default=0)), 2)
        for size, table in enumerate(ngrams.tables, 1):
            values[f"distinct_{size}"] = len(table) / max(1, len(ngrams.numbers[size - 1]))
        shares = ngrams.totals(1) / max(1, len(ngrams.numbers[0]))
        return values | {
            "unique_share": len({row.tobytes() for row in rows}) / len(rows),
            "empty_share": sum(not len(row) for row in rows) / len(rows),
            "word_entropy": float(-(shares * numpy.log(shares)).sum()),
            "reverse_nll": reverse_nll(samples, reference, pad_id=pad_id),
        }

    return measure


def collapse_reason(
    values: Mapping[str, float], *, unique_share: float = 0.05, self_bleu_3: float = 0.95, nll_div: float = 0.1
) -> str | None:
    """Why a generator counts as collapsed, None if it does not; what was not measured says nothing.

    Args:
        values: of `text_diversity` or of a record of `train_dpgan`.
        unique_share: fewer different sentences than this share of the samples.
        self_bleu_3: more than this.
        nll_div: fewer nats than this of a position of its own text.
    """
    if values.get("unique_share", 1.0) < unique_share:
        return f"{values['unique_share']:.3f} of the samples are different sentences, fewer than {unique_share:g}"
    if values.get("self_bleu_3", 0.0) > self_bleu_3:
        return f"self-BLEU-3 is {values['self_bleu_3']:.3f}, above {self_bleu_3:g}"
    if values.get("nll_div", nll_div) < nll_div:
        return f"its own text has {values['nll_div']:.3f} nats a position, fewer than {nll_div:g}"
    return None
