"""The testbed that studies of language models share: bytes, small models, equal budgets, bits per byte.

- `byte_stream`, `documents`, `corpus_hash`: the standard library's sources, split by file; a byte is a token.
- `tiny_llama`, `tiny_bert`: small models of transformers; `parameter_counts`, `flops_per_token`: what they cost.
- `train_windows`, `train_bytes`: AdamW on windows that every arm of a study sees in the same order.
- `bits_per_byte`, `loss_by_position`: how well a model predicts the next byte.
- `Arm`, `compare`, `paired`, `mean_of`, `match_width`: arms of equal parameters or operations, over seeds, as rows of a table.
"""

from __future__ import annotations

from layerwright.studies.sequence.arms import Arm, compare, match_width, mean_of, paired
from layerwright.studies.sequence.corpus import byte_stream, corpus_hash, documents
from layerwright.studies.sequence.evaluation import bits_per_byte, loss_by_position
from layerwright.studies.sequence.models import flops_per_token, parameter_counts, tiny_bert, tiny_llama
from layerwright.studies.sequence.training import train_bytes, train_windows

__all__ = [
    "Arm",
    "bits_per_byte",
    "byte_stream",
    "compare",
    "corpus_hash",
    "documents",
    "flops_per_token",
    "loss_by_position",
    "match_width",
    "mean_of",
    "paired",
    "parameter_counts",
    "tiny_bert",
    "tiny_llama",
    "train_bytes",
    "train_windows",
]
