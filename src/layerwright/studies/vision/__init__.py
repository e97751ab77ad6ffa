"""The testbed that studies of vision share: small pictures, one training loop, measures of classification and localisation.

- `split_digits`: scikit-learn's digits in stratified parts, enlarged and standardised; `few_shot`: some of each class.
- `fit_`: AdamW or SGD on pictures in memory, with cosine decay to zero.
- `accuracy`, `predict`: of a classifier, in batches.
- `mean_iou`, `pointing_game`, `calibration_error`: other measures.
- `mean_of`, `worst_of`: over the seeds of an arm of a table.
- `shifted`: pictures moved by a pixel at random, to train on.
"""

from __future__ import annotations

from layerwright.studies.sequence.arms import mean_of
from layerwright.studies.vision.fitting import fit_
from layerwright.studies.vision.measures import (
    accuracy,
    calibration_error,
    mean_iou,
    pointing_game,
    predict,
    worst_of,
)
from layerwright.studies.vision.pictures import few_shot, shifted, split_digits

__all__ = [
    "accuracy",
    "calibration_error",
    "few_shot",
    "fit_",
    "mean_iou",
    "mean_of",
    "pointing_game",
    "predict",
    "shifted",
    "split_digits",
    "worst_of",
]
