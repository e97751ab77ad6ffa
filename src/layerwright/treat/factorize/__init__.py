"""Low-rank factors of weights, with or without regard to the inputs."""

from __future__ import annotations

from layerwright.treat.factorize._svd import low_rank, output_spectrum, svd_factors

__all__ = ["low_rank", "output_spectrum", "svd_factors"]
