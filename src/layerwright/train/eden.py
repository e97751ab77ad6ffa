"""A learning rate that falls with batches and epochs."""

from __future__ import annotations

import math

import torch

from layerwright.core.errors import InputError

__all__ = ["Eden", "eden_factor"]


def eden_factor(
    batch: int,
    epoch: int,
    batches: float = 5000,
    epochs: float = 6,
    warmup_batches: int = 500,
    warmup_start: float = 0.5,
) -> float:
    """Share of the learning rate: ``((k^2 + K^2) / K^2)^-1/4 ((e^2 + E^2) / E^2)^-1/4``, rising linearly from
    `warmup_start` to all of it over the first batches.

    Args:
        batch, epoch: ``k`` and ``e``, from 0.
        batches, epochs: ``K`` and ``E``, from where on it falls noticeably.
        warmup_batches, warmup_start: how long, and from which share.
    """
    falling = ((batch**2 + batches**2) / batches**2) ** -0.25 * ((epoch**2 + epochs**2) / epochs**2) ** -0.25
    rising = min(1.0, warmup_start + (1 - warmup_start) * batch / warmup_batches) if warmup_batches else 1.0
    return falling * rising


class Eden:
    """Sets the learning rates of an optimizer from the number of batches and of epochs so far (the schedule that comes
    with ScaledAdam; Yao et al., 2023, Zipformer, arXiv 2310.11230).

    Call `step_batch` after every step of the optimizer, and `step_epoch` with every epoch.

    Args:
        optimizer: its groups' rates now are the highest ones.
        batches, epochs: from where on the rate falls noticeably.
        warmup_batches: batches over which it rises, 0 for none.
        warmup_start: share of the rate that it rises from, 0 to 1.

    Raises:
        InputError: a number out of its range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        batches: float = 5000,
        epochs: float = 6,
        warmup_batches: int = 500,
        warmup_start: float = 0.5,
    ) -> None:
        if not (batches > 0 and epochs > 0 and math.isfinite(batches) and math.isfinite(epochs)):
            raise InputError(f"batches, epochs: got {batches}, {epochs}, expected numbers above 0")
        if warmup_batches < 0 or not 0 <= warmup_start <= 1:
            raise InputError(
                f"warmup_batches, warmup_start: got {warmup_batches}, {warmup_start}, expected 0 or more, and 0 to 1"
            )
        self.optimizer = optimizer
        self.settings = float(batches), float(epochs), warmup_batches, warmup_start
        self.highest = [float(group["lr"]) for group in optimizer.param_groups]
        self.batch = self.epoch = 0
        self._set()

    def step_batch(self) -> None:
        """One batch more."""
        self.batch += 1
        self._set()

    def step_epoch(self) -> None:
        """One epoch more."""
        self.epoch += 1
        self._set()

    def rates(self) -> list[float]:
        """The learning rates now, one for each group."""
        factor = eden_factor(self.batch, self.epoch, *self.settings)
        return [rate * factor for rate in self.highest]

    def state_dict(self) -> dict[str, object]:
        """Plain data to go on from."""
        return {"batch": self.batch, "epoch": self.epoch, "highest": list(self.highest)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from what `state_dict` returned."""
        batch, epoch, highest = state["batch"], state["epoch"], state["highest"]
        assert isinstance(batch, int) and isinstance(epoch, int) and isinstance(highest, list)
        self.batch, self.epoch, self.highest = batch, epoch, [float(rate) for rate in highest]
        self._set()

    def _set(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates(), strict=True):
            group["lr"] = rate
