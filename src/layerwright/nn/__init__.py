"""Drop-in layers: plain `torch.nn.Module` that hold treated weights in fewer bytes.

- `QuantLinear`, `QuantConv`, `QuantEmbedding`: packed integers of 2 to 8 bits.
- `SparseLinear`, `SparseConv`: a bit mask and the kept weights.
- `LowRankLinear`, `LowRankConv`: two thin factors.
- `PackedStack`, `SparseStack`, `LowRankStack`: experts that a model keeps in one three-dimensional parameter.
- `Stored`: a treated weight as tensors, from which they are made.
- `replace_`, `structure_of`, `rebuild_`, `module_from_spec`: put them into a model, list them, build them again.
"""

from __future__ import annotations

from layerwright.nn.experts import LowRankStack, PackedStack, SparseStack, replace_parameter_
from layerwright.nn.low_rank import LowRankConv, LowRankLinear
from layerwright.nn.quantized import QuantConv, QuantEmbedding, QuantLinear
from layerwright.nn.replace import module_from_spec, rebuild_, replace_, structure_of
from layerwright.nn.sparse import SparseConv, SparseLinear
from layerwright.nn.stored import Stored

__all__ = [
    "LowRankConv",
    "LowRankLinear",
    "LowRankStack",
    "PackedStack",
    "QuantConv",
    "QuantEmbedding",
    "QuantLinear",
    "SparseConv",
    "SparseLinear",
    "SparseStack",
    "Stored",
    "module_from_spec",
    "rebuild_",
    "replace_",
    "replace_parameter_",
    "structure_of",
]
