"""The search for a proxy: evolution with diversity prompting, compatibility screening and prioritised operations."""

from layerwright.score.proxies.search.evolution import EvolvedProxy, evolve_proxy
from layerwright.score.proxies.search.genetics import crossover, distance, mutate, random_proxy
from layerwright.score.proxies.search.screening import Judge, Table, Verdict

__all__ = [
    "EvolvedProxy",
    "Judge",
    "Table",
    "Verdict",
    "crossover",
    "distance",
    "evolve_proxy",
    "mutate",
    "random_proxy",
]
