"""Self-BLEU of generated sentences: counted once, beside the form that counts every reference again for every sentence.

Run: ``python -m benchmarks.bleu``. Beside NLTK and fast-bleu where they are installed (``pip install nltk fast-bleu``), and beside the
project's own slow form. They take turns; scores are printed with the median of the ratios of processor time, all threads together.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerwright.data.grammar import SentenceGrammar
from layerwright.explain.text_diversity import self_bleu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from oracles import sadpgan as oracle

ORDER = 3
Peer = Callable[[list[list[str]]], float]


def optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def peers() -> dict[str, Peer]:
    found: dict[str, Peer] = {"pair by pair (oracle)": lambda rows: oracle.self_bleu(rows, ORDER)}
    if nltk := optional("nltk.translate.bleu_score"):
        smoothing, weights = nltk.SmoothingFunction().method1, (1 / ORDER,) * ORDER

        def with_nltk(rows: list[list[str]]) -> float:
            scores = [
                nltk.sentence_bleu(rows[:i] + rows[i + 1 :], row, weights, smoothing_function=smoothing)
                for i, row in enumerate(rows)
            ]
            return sum(scores) / len(scores)

        found["NLTK"] = with_nltk
    if fast := optional("fast_bleu"):

        def with_fast_bleu(rows: list[list[str]]) -> float:
            scores = fast.SelfBLEU(rows, {ORDER: (1 / ORDER,) * ORDER}).get_score()[ORDER]
            return float(sum(scores) / len(scores))

        found["fast-bleu"] = with_fast_bleu
    return found


def seconds(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def main() -> None:
    """Print scores and ratios for several numbers of sentences."""
    grammar = SentenceGrammar()
    for count, rounds in ((50, 5), (200, 3)):
        rows = [text.split() for text in grammar.decode(grammar.sample(count))]
        ours = self_bleu(rows, (ORDER,))[ORDER]
        for name, peer in peers().items():
            theirs = peer(rows)
            pairs = [(seconds(lambda: self_bleu(rows, (ORDER,))), seconds(lambda: peer(rows))) for _ in range(rounds)]  # noqa: B023
            ratio = statistics.median(slow / quick for quick, slow in pairs)
            print(f"{count:5} sentences, {name}: score {theirs:.6f}, ours {ours:.6f}; {ratio:.1f} times our time")
    for count in (1000, 5000):
        rows = [text.split() for text in grammar.decode(grammar.sample(count))]
        times = sorted(seconds(lambda: self_bleu(rows, (ORDER,))) for _ in range(3))  # noqa: B023
        print(f"{count:5} sentences, ours: {times[1]:.3f} s")
        if (fast := peers().get("fast-bleu")) is not None:
            again = sorted(seconds(lambda: fast(rows)) for _ in range(3))  # noqa: B023
            print(f"{count:5} sentences, fast-bleu: {again[1] / times[1]:.1f} times our time")


if __name__ == "__main__":
    main()
