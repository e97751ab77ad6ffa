"""Proxies of bit vectors: scores without training or treating, hand-made or found by evolution.

- `layer_statistics`: activations, gradients, weights, Hessian diagonals and virtual gradients, measured once.
- `BIT_PROXIES`: the published hand-made proxies. `ProxyTree`: a proxy as an expression.
- `BitBench`: measured bit vectors. `spearman`: the rank correlation that proxies are judged by.
- `emq`: a proxy as a scorer. `evolve_proxy` (in `search`): finds one.
"""

from layerwright.score.proxies.bench import BitBench, spearman, vector_scores
from layerwright.score.proxies.expression import ProxyTree
from layerwright.score.proxies.handmade import BIT_PROXIES, BitProxy
from layerwright.score.proxies.scorer import as_proxy, bundled_proxy, emq, proxy_damages
from layerwright.score.proxies.search import EvolvedProxy, evolve_proxy
from layerwright.score.proxies.statistics import STATISTICS, LayerStatistics, layer_statistics
from layerwright.score.proxies.weighting import WEIGHTINGS, Weighting, bit_weights

__all__ = [
    "BIT_PROXIES",
    "STATISTICS",
    "WEIGHTINGS",
    "BitBench",
    "BitProxy",
    "EvolvedProxy",
    "LayerStatistics",
    "ProxyTree",
    "Weighting",
    "as_proxy",
    "bit_weights",
    "bundled_proxy",
    "emq",
    "evolve_proxy",
    "layer_statistics",
    "proxy_damages",
    "spearman",
    "vector_scores",
]
