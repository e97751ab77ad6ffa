"""Start and train networks: first weights, optimizers and their schedules.

- `ScaledAdam`: Adam whose steps are a share of each parameter's size, which it learns as well.
- `Eden`: a learning rate that falls with the number of batches and of epochs, whatever the batch size.
- `lsuv_`, `orthonormal_`: orthonormal weights, each divided until its output has unit variance (LSUV).
- `train_dpgan`: a text GAN that rewards surprise; `dpgan_returns`: what its words earn (SADPGAN).
"""

from __future__ import annotations

from layerwright.train.dpgan import (
    DivergedError,
    DPGANConfig,
    DPGANHistory,
    EpochRecord,
    discriminator_loss,
    dpgan_returns,
    generator_sample,
    train_dpgan,
)
from layerwright.train.eden import Eden
from layerwright.train.lsuv import LSUVReport, LSUVRow, lsuv_, orthonormal_
from layerwright.train.scaled_adam import ScaledAdam

__all__ = [
    "DPGANConfig",
    "DPGANHistory",
    "DivergedError",
    "Eden",
    "EpochRecord",
    "LSUVReport",
    "LSUVRow",
    "ScaledAdam",
    "discriminator_loss",
    "dpgan_returns",
    "generator_sample",
    "lsuv_",
    "orthonormal_",
    "train_dpgan",
]
