"""A controller that learns which layers to widen and where to insert one.

- `MetaController`: a bidirectional LSTM reads the words of a network; one actor widens, another inserts layers.
- `PlainSpace`, `DenseSpace`: the words, the sizes that may follow each other, and what may not be done.
- `search`: episodes of growth, judged by a function; the controller learns by REINFORCE, or draws at random.
- `save_controller`, `load_controller_`: to go on later.
- `reward`, `Baseline`: what a network's accuracy is worth.
"""

from __future__ import annotations

from layerwright.allocate.controller.network import Decisions, MetaController
from layerwright.allocate.controller.saved import load_controller_, save_controller
from layerwright.allocate.controller.search import Candidate, Episode, Insertion, Widening, search
from layerwright.allocate.controller.space import DenseSpace, PlainSpace, Space
from layerwright.allocate.controller.value import Baseline, reward

__all__ = [
    "Baseline",
    "Candidate",
    "Decisions",
    "DenseSpace",
    "Episode",
    "Insertion",
    "MetaController",
    "PlainSpace",
    "Space",
    "Widening",
    "load_controller_",
    "reward",
    "save_controller",
    "search",
]
