"""Held-out loss of ``demo:lm`` beside a 5-gram byte model with backoff (interpolated Kneser-Ney), on the same text.

Run: ``python -m benchmarks.ngram``. The n-gram model counts all training text; both predict the same held-out windows.
"""

from __future__ import annotations

import math

import numpy

from layerwright.data.demo.train_lm import byte_stream
from layerwright.data.demo_data import demo_data
from layerwright.data.loading import load
from layerwright.data.stdlib import stdlib_text

ORDER, SYMBOLS = 5, 258


def keys(stream: numpy.ndarray, order: int) -> numpy.ndarray:
    """Every run of `order` symbols of `stream` ``(n,)`` as one number: ``(n - order + 1,)``."""
    count = len(stream) - order + 1
    found = numpy.zeros(count, dtype=numpy.int64)
    for offset in range(order):
        found = found * SYMBOLS + stream[offset : offset + count]
    return found


class KneserNey:
    """Interpolated Kneser-Ney with one discount per order (Kneser and Ney, 1995; Chen and Goodman, 1999)."""

    def __init__(self, stream: numpy.ndarray, order: int) -> None:
        self.order = order
        self.tables = []
        whole, counts = numpy.unique(keys(stream, order), return_counts=True)
        for size in range(order, 0, -1):
            self.tables.append(self._table(whole, counts))
            if size > 1:  # lower orders count in how many contexts a run appears
                whole, counts = numpy.unique(whole % SYMBOLS ** (size - 1), return_counts=True)

    @staticmethod
    def _table(runs: numpy.ndarray, counts: numpy.ndarray) -> tuple[numpy.ndarray, ...]:
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        discount = ones / max(ones + 2 * twos, 1)
        contexts, starts = numpy.unique(runs // SYMBOLS, return_index=True)
        totals = numpy.add.reduceat(counts, starts)
        kinds = numpy.diff(numpy.append(starts, len(runs)))
        return runs, counts, contexts, totals, kinds, numpy.array(discount)

    def probability(self, runs: numpy.ndarray) -> numpy.ndarray:
        """Probability of the last symbol of each run of `order` symbols given the others."""
        result = numpy.full(len(runs), 1.0 / SYMBOLS)
        for size, (known, counts, contexts, totals, kinds, discount) in zip(
            range(1, self.order + 1), reversed(self.tables), strict=True
        ):
            part = runs % SYMBOLS**size
            count = _look(known, counts, part)
            total, kind = _look(contexts, totals, part // SYMBOLS), _look(contexts, kinds, part // SYMBOLS)
            seen = total > 0
            safe = numpy.maximum(total, 1)
            value = numpy.maximum(count - discount, 0) / safe + discount * kind / safe * result
            result = numpy.where(seen, value, result)
        return result


def _look(known: numpy.ndarray, values: numpy.ndarray, wanted: numpy.ndarray) -> numpy.ndarray:
    where = numpy.minimum(numpy.searchsorted(known, wanted), len(known) - 1)
    return numpy.where(known[where] == wanted, values[where], 0)


def main() -> None:
    """Measure both and print nats and bits per byte."""
    stream = byte_stream(stdlib_text("train")).numpy()
    model = KneserNey(stream, ORDER)
    network, tokenizer = load("demo:lm", dtype="float32")
    data = demo_data("demo:lm", tokenizer, "heldout", samples=64, length=256)
    losses = []
    for batch in data:
        windows = batch["input_ids"].numpy()
        runs = numpy.stack([keys(row, ORDER) for row in windows])
        losses.append(-numpy.log(model.probability(runs.ravel())).mean())
    ngram, ours = float(numpy.mean(losses)), data.mean_loss(network)
    print(f"5-gram, interpolated Kneser-Ney: {ngram:.4f} nats/byte = {ngram / math.log(2):.4f} bits/byte")
    print(f"demo:lm:                         {ours:.4f} nats/byte = {ours / math.log(2):.4f} bits/byte")
    print(f"ratio {ours / ngram:.3f}")


if __name__ == "__main__":
    main()
