"""Growth that keeps a network's function: wider layers, more layers.

- `widen`: duplicate outputs of a layer at random and divide their readers' weights (Net2Wider); `widen_` in place.
- `deepen`: insert a layer that begins as an identity (Net2Deeper); `deepen_` in place.
- `widen_mlp`: the same for the feed-forward part of a transformer; `widen_mlp_` in place.
- `GrowthMap`: which old output each new one repeats. `growth_map` draws one.
- `widen_producer`, `widen_consumer`: what it does to a weight. `find_reach`: who reads a layer's outputs.
- Blocks of a transformer that begin as identities: `layerwright.treat.expand.expand_blocks`.
"""

from __future__ import annotations

from layerwright.treat.grow.deeper import deepen, deepen_
from layerwright.treat.grow.feed_forward import widen_mlp, widen_mlp_
from layerwright.treat.grow.growth_map import GrowthMap, growth_map, widen_consumer, widen_producer
from layerwright.treat.grow.reach import Reach, Reader, find_reach
from layerwright.treat.grow.wider import grow_readers_, widen, widen_

__all__ = [
    "GrowthMap",
    "Reach",
    "Reader",
    "deepen",
    "deepen_",
    "find_reach",
    "grow_readers_",
    "growth_map",
    "widen",
    "widen_",
    "widen_consumer",
    "widen_mlp",
    "widen_mlp_",
    "widen_producer",
]
