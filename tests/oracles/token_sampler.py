"""Adaptive token sampling by loops."""

from __future__ import annotations


def sample(scores: list[float], points: list[float], rule: str) -> list[int]:
    """Tokens of the sums nearest to, or first to reach, each point; each once, in order."""
    total, sums = sum(scores), []
    running = 0.0
    for score in scores:
        running += score
        sums.append(running / total)
    kept = set()
    for point in points:
        if rule == "inverse":
            kept.add(next((i for i, value in enumerate(sums) if value >= point), len(scores) - 1))
            continue
        best = None
        for i, value in enumerate(sums):
            if scores[i] > 0 and (best is None or abs(value - point) <= abs(sums[best] - point)):
                best = i
        assert best is not None
        kept.add(best)
    return sorted(kept)
