"""Settings and records of the training of a text GAN."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from layerwright.core.errors import InputError, LayerwrightError, unknown_name

__all__ = ["DPGANConfig", "DPGANHistory", "DivergedError", "EpochRecord", "GeneratorSamples"]

GeneratorSamples = Literal["teacher_argmax", "teacher_multinomial", "free"]
Phase = Literal["mle", "discriminator", "adversarial"]


class DivergedError(LayerwrightError, RuntimeError):
    """A reward or loss that is not finite."""


@dataclass(frozen=True)
class DPGANConfig:
    """How a text GAN is trained; the defaults are those of the PyTorch port of DPGAN, without guards.

    Attributes:
        mle_epochs: passes over the data with maximum likelihood.
        d_pre_steps, d_pre_epochs: of the discriminator before the adversarial phase: draws of generated text, and passes
            over each.
        adversarial_epochs: each of `g_steps` batches for the generator, then `d_steps` draws of generated text with
            `d_epochs` passes each.
        d_samples: real sentences that a draw of the discriminator's takes, at random; None for all.
        batch: sentences of a step.
        g_lr, d_lr: Adam's rates.
        warmup_steps: steps over which each optimizer's rate rises linearly; 0 for none, as published.
        max_grad_norm: bound on the norm of each gradient.
        gamma: discount of the returns, 0 to 1.
        clip: bound on a word's surprise, in returns and in the discriminator's loss on real text, nats; None for none, as
            in the port. The original code has 12.
        mle_weight: after each step for the generator, a step of maximum likelihood on real text, weighted by its surprise,
            at this share of `g_lr`; 0 for none, as in the port.
        baseline: subtract a running mean of the returns of each position.
        samples: what the generator is rewarded for: ``teacher_argmax``, its likeliest word after each real prefix (the
            port); ``teacher_multinomial``, a word drawn there; ``free``, sentences of its own.
        eval_every: epochs between measurements; the last epoch of a phase is always measured.
        eval_samples: sentences that are drawn to measure.
        seed: of everything random.

    Raises:
        InputError: a number outside its range or an unknown name.
    """

    mle_epochs: int = 120
    d_pre_steps: int = 5
    d_pre_epochs: int = 3
    adversarial_epochs: int = 200
    g_steps: int = 1
    d_steps: int = 4
    d_epochs: int = 2
    d_samples: int | None = None
    batch: int = 64
    g_lr: float = 1e-2
    d_lr: float = 1e-2
    warmup_steps: int = 0
    max_grad_norm: float = 5.0
    gamma: float = 1.0
    clip: float | None = None
    mle_weight: float = 0.0
    baseline: bool = False
    samples: GeneratorSamples = "teacher_argmax"
    eval_every: int = 1
    eval_samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        lows = {"batch": 1, "eval_every": 1, "eval_samples": 2}
        lows |= dict.fromkeys(("mle_epochs", "d_pre_steps", "d_pre_epochs", "adversarial_epochs", "warmup_steps"), 0)
        lows |= dict.fromkeys(("g_steps", "d_steps", "d_epochs"), 0)
        for name, low in lows.items():
            if getattr(self, name) < low:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least {low}")
        if self.d_samples is not None and self.d_samples < self.batch:
            raise InputError(f"d_samples: got {self.d_samples}, expected at least one batch of {self.batch}, or None")
        for name in ("g_lr", "d_lr", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name}: got {getattr(self, name)}, expected a number above 0")
        if not self.mle_weight >= 0 or not math.isfinite(self.mle_weight):
            raise InputError(f"mle_weight: got {self.mle_weight}, expected 0 or more")
        check_returns(self.gamma, self.clip)
        if self.samples not in get_args(GeneratorSamples):
            raise unknown_name("kind of samples", self.samples, get_args(GeneratorSamples))

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def check_returns(gamma: float, clip: float | None) -> None:
    """Raise `InputError` for a discount outside 0 to 1, or a bound that is not above 0."""
    if not 0 <= gamma <= 1:
        raise InputError(f"gamma: got {gamma}, expected 0 to 1")
    if clip is not None and not clip > 0:
        raise InputError(f"clip: got {clip}, expected a number of nats above 0, or None")


@dataclass(frozen=True)
class EpochRecord:
    """What was measured after an epoch.

    Attributes:
        phase: ``mle``, ``discriminator`` or ``adversarial``.
        epoch: of that phase, from 1.
        values: by name. `nll_gen`: loss of real text under the generator, nats of a position; `nll_div`: of its own text;
            `unique_share`: different sentences among samples; `reward_real`, `reward_generated`: surprise of the
            discriminator; `g_loss`: mean loss of the generator's steps; and what `evaluate` returned.
    """

    phase: Phase
    epoch: int
    values: Mapping[str, float] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"phase": self.phase, "epoch": self.epoch, "values": dict(self.values)}


@dataclass
class DPGANHistory:
    """Records of all measured epochs, and why training stopped: ``finished``, or what `stop` said; empty while it runs."""

    records: list[EpochRecord] = field(default_factory=list)
    reason: str = ""

    def last(self, phase: Phase) -> EpochRecord:
        """The last record of a phase.

        Raises:
            InputError: there is none.
        """
        for record in reversed(self.records):
            if record.phase == phase:
                return record
        raise InputError(f"the history holds no record of the phase {phase!r}")

    def column(self, name: str, phase: Phase | None = None) -> list[float]:
        """One value through the epochs of a phase, or of all; NaN where it was not measured."""
        return [record.values.get(name, math.nan) for record in self.records if phase in (None, record.phase)]

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"reason": self.reason, "records": [record.to_data() for record in self.records]}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> DPGANHistory:
        """What `to_data` gave."""
        return cls([EpochRecord(**record) for record in data["records"]], data["reason"])
