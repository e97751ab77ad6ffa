"""An inference engine for transformers decoders (Li et al., 2021, EET, arXiv 2104.12470).

- `compile_inference`: a decoder in the form in which it decodes fastest; gives an `InferenceModel`.
- `InferenceModel`: prompt, step, encode, generate; `GenerationOutput`, `Sampling`.
- `StaticKVCache`: keys and values, allocated once.
- `Workspace`, `MemoryPlan`, `Interval`, `BufferPool`: where the results of a step lie.
- `fold_norm_`: the gain of an RMSNorm into the layers after it.
"""

from __future__ import annotations

from layerwright.treat.engine._cache import StaticKVCache
from layerwright.treat.engine._compile import compile_inference
from layerwright.treat.engine._generate import GenerationOutput
from layerwright.treat.engine._model import InferenceModel
from layerwright.treat.engine._sampling import Sampling
from layerwright.treat.engine._sources import SUPPORTED
from layerwright.treat.engine._weights import fold_norm_
from layerwright.treat.engine._workspace import BufferPool, Interval, MemoryPlan, Workspace

__all__ = [
    "SUPPORTED",
    "BufferPool",
    "GenerationOutput",
    "InferenceModel",
    "Interval",
    "MemoryPlan",
    "Sampling",
    "StaticKVCache",
    "Workspace",
    "compile_inference",
    "fold_norm_",
]
