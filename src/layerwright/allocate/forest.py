"""A random forest that predicts what a design costs, from designs whose cost is known."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from layerwright.allocate.tree import Floats
from layerwright.core.errors import InputError, require_extra

__all__ = ["CostForest", "CostPredictor"]


class CostPredictor(Protocol):
    """Learns costs from features."""

    def fit(self, features: Floats, costs: Floats) -> None:
        """Learn from designs ``(designs, features)`` and their costs ``(designs,)``."""

    def predict(self, features: Floats) -> Floats:
        """Costs ``(designs,)``."""


class CostForest:
    """Regression trees on the rate ``1 / cost`` (throughput), as Yu and Bouganis (2023) predict it.

    Args:
        trees, depth: number of trees and their largest depth; leaves of one design, splits of two.
        seed: of the samples that each tree sees.
    """

    def __init__(self, trees: int = 370, depth: int = 50, seed: int = 0) -> None:
        if trees < 1 or depth < 1:
            raise InputError(f"forest: got {trees} trees of depth {depth}, expected at least 1")
        self.trees, self.depth, self.seed = trees, depth, seed
        self.out_of_bag: float | None = None
        self._forest: Any = None

    def fit(self, features: Floats, costs: Floats) -> None:
        """Learn; `out_of_bag` is then the share of the rate's variance that trees explain of designs they did not see.

        Raises:
            InputError: a cost that is not a number above 0.
            MissingExtraError: scikit-learn is not installed.
        """
        if len(costs) < 2 or not bool((np.isfinite(costs) & (costs > 0)).all()):
            raise InputError("costs: expected at least two designs, with finite costs above 0")
        ensemble = require_extra("sklearn.ensemble", "data")
        # A few trees leave designs that every one of them has seen: no estimate then.
        estimate = self.trees >= 50
        self._forest = ensemble.RandomForestRegressor(
            n_estimators=self.trees,
            max_depth=self.depth,
            min_samples_leaf=1,
            min_samples_split=2,
            max_features=1.0,
            oob_score=estimate,
            random_state=self.seed,
        )
        self._forest.fit(features, 1.0 / costs)
        self.out_of_bag = float(self._forest.oob_score_) if estimate else None

    def predict(self, features: Floats) -> Floats:
        """Costs ``(designs,)``.

        Raises:
            InputError: nothing was learned yet.
        """
        if self._forest is None:
            raise InputError("forest: fit it before it predicts")
        # Tree by tree: the forest's own `predict` starts a pool of workers each time, which takes longer than the trees.
        rows = np.ascontiguousarray(features, dtype=np.float32)
        rates = [tree.tree_.predict(rows)[:, 0] for tree in self._forest.estimators_]
        return np.asarray(1.0 / np.mean(rates, 0))
