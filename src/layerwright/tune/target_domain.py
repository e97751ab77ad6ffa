"""Train a speech network of many voices for the good of one (Zhang et al., 2022, TDASS, arXiv 2205.11824)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError, unknown_name
from layerwright.data.spoken import SpeechBatch
from layerwright.nn.gradient_scale import SelfInterestedClassifier
from layerwright.tune._loop import Progress, Schedule, restore_flags_, train_, trainable_copy
from layerwright.tune._speech_losses import guided_attention_loss, real_steps, speech_losses

__all__ = ["TDASS", "reversal_strength", "target_share", "tdass", "train_target_domain_"]

Placement = Literal["memory", "decoder"]
Adversary = Literal["target", "speaker"]


def reversal_strength(progress: float, largest: float = 1.0) -> float:
    """Lambda as training goes on from 0 to 1: ``largest (2 / (1 + exp(-10 progress)) - 1)`` (Ganin et al., 2016)."""
    return largest * (2 / (1 + math.exp(-10 * min(max(progress, 0.0), 1.0))) - 1)


def target_share(batches: Iterable[SpeechBatch], target_speaker: int) -> float:
    """Share of utterances that are the target's.

    Raises:
        InputError: none is, or there are no batches.
    """
    speakers = [batch.speaker for batch in batches]
    if not speakers:
        raise InputError("no batches to train on")
    share = float((torch.cat(speakers) == target_speaker).float().mean())
    if not share:
        raise InputError(f"target_speaker: no utterance of speaker {target_speaker} in the data; expected at least one")
    return share


class TDASS(nn.Module):
    """A speech network beside a classifier that works for the target speaker alone.

    The classifier reads a feature of each utterance and tells target from non-target. Its gradient reaches the network
    times lambda for target utterances, so that they stay recognisable, and times -lambda for all others, so that they
    are taken for the target's and teach its voice to speak. Inference is the network's own, with the target's id.

    ``loss = mel_before + mel_after + stop + weight * classifier``, the last one balanced over its classes.

    Args:
        backbone: a `layerwright.models.Tacotron2`, or what is called as one and has its ``config``; it is trained.
        target_speaker: id.
        share: of utterances that are the target's, above 0 and below 1; see `target_share`.
        placement: where the feature is taken: ``memory`` (mean over symbols, after the speaker's embedding has come in) or
            ``decoder`` (mean of the attention LSTM's states over steps).
        weight: of the classifier's loss; 0 trains the backbone alone.
        hidden: width of the classifier.
        strength: largest lambda; see `reversal_strength`.
        target, non_target: see `ConditionalGradientReversal`.
        adversary: ``target`` as published; ``speaker`` is usual domain-adversarial training: a classifier of all
            speakers whose gradient is reversed for everyone.
        guided: weight of the guided attention loss, which falls to 0 in the first half of training. Not of the publication:
            it makes attention form within few steps.
        generator: of the classifier's first weights.

    Raises:
        InputError: a number outside its range, or an unknown name.
    """

    def __init__(
        self,
        backbone: Any,
        target_speaker: int,
        share: float,
        *,
        placement: Placement = "memory",
        weight: float = 0.1,
        hidden: int = 256,
        strength: float = 1.0,
        target: float = 1.0,
        non_target: float = -1.0,
        adversary: Adversary = "target",
        guided: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if placement not in get_args(Placement):
            raise unknown_name("placement", str(placement), get_args(Placement))
        if adversary not in get_args(Adversary):
            raise unknown_name("adversary", str(adversary), get_args(Adversary))
        if not 0 < share <= 1:
            raise InputError(f"share: got {share}, expected above 0 and at most 1: the target needs utterances")
        if min(weight, strength, guided) < 0 or not math.isfinite(weight + strength + guided):
            raise InputError(f"got weight={weight}, strength={strength}, guided={guided}, expected each from 0")
        self.backbone = backbone
        config = backbone.config
        speakers = int(backbone.num_speakers)
        if not 0 <= target_speaker < speakers:
            raise InputError(f"target_speaker: got {target_speaker}, expected 0 to {speakers - 1}")
        dim = config.encoder_dim if placement == "memory" else config.lstm_dim
        factors = (target, non_target) if adversary == "target" else (-1.0, -1.0)
        classes = 2 if adversary == "target" else max(2, speakers)
        self.classifier = SelfInterestedClassifier(
            dim, hidden, classes=classes, target=factors[0], non_target=factors[1], generator=generator
        )
        self.target_speaker, self.share = target_speaker, share
        self.placement, self.weight, self.strength = placement, weight, strength
        self.adversary, self.guided = adversary, guided

    def loss(self, batch: SpeechBatch, progress: float, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The terms of the loss by name, and ``total``.

        Args:
            batch: utterances.
            progress: of training, 0 to 1.
            generator: of dropout.

        Raises:
            InputError: a batch that the backbone does not take.
        """
        output = self.backbone(*batch, generator)
        step = self.backbone.config.frames_per_step
        terms = speech_losses(output, batch, step)
        total = terms["mel_before"] + terms["mel_after"] + terms["stop"]
        if self.weight:
            terms["classifier"] = self._classifier_loss(self.feature(output, batch), batch.speaker, progress)
            total = total + self.weight * terms["classifier"]
        if self.guided and progress < 0.5:
            steps = real_steps(batch.mel_lengths, step)
            terms["guided"] = guided_attention_loss(output.alignments, batch.text_lengths, steps)
            total = total + self.guided * (1 - 2 * progress) * terms["guided"]
        return terms | {"total": total}

    def forward(
        self, batch: SpeechBatch, progress: float, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `loss`."""
        return self.loss(batch, progress, generator)

    def feature(self, output: Any, batch: SpeechBatch) -> Tensor:
        """What the classifier reads of each utterance, ``(batch, dim)``: a mean over real symbols or steps."""
        values, lengths = output.memory, batch.text_lengths
        if self.placement == "decoder":
            values, lengths = output.states, real_steps(batch.mel_lengths, self.backbone.config.frames_per_step)
        lengths = lengths.to(values.device)[:, None]
        real = torch.arange(values.shape[1], device=values.device) < lengths
        mean: Tensor = (values * real[..., None]).sum(1) / lengths
        return mean

    def _classifier_loss(self, feature: Tensor, speaker: Tensor, progress: float) -> Tensor:
        speaker = speaker.to(feature.device)
        is_target = speaker == self.target_speaker
        logits = self.classifier(feature, is_target, reversal_strength(progress, self.strength)).float()
        if self.adversary == "speaker":
            return F.cross_entropy(logits, speaker)
        # Weights that make both classes count alike over the whole data, whatever a batch happens to hold.
        balance = torch.where(is_target, 1 / self.share, 1 / (1 - self.share) if self.share < 1 else 0.0) / 2
        return (balance * F.cross_entropy(logits, is_target.long(), reduction="none")).mean()


def train_target_domain_(
    model: TDASS,
    batches: Sequence[SpeechBatch],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    final_rate: float = 1e-5,
    hold: float = 0.5,
    weight_decay: float = 1e-6,
    clip: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train backbone and classifier in place; the backbone is left in the mode it was in. Returns the loss of each step.

    Adam's settings are Tacotron 2's (betas 0.9 and 0.999, epsilon 1e-6).

    Args:
        model: what is trained.
        batches: walked in random order, again and again.
        steps: one batch each.
        learning_rate, final_rate: held for the share `hold` of the steps, then falling by a constant factor each step.
        weight_decay, clip, seed: see `Schedule`; the seed also draws dropout.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError: a number outside its range, no target utterance, or a loss that is not finite.
    """
    schedule = Schedule(steps, learning_rate, weight_decay, clip=clip, seed=seed)
    if not 0 < final_rate <= learning_rate or not 0 <= hold <= 1:
        raise InputError(f"final_rate, hold: got {final_rate}, {hold}, expected up to {learning_rate}, and 0 to 1")
    target_share(batches, model.target_speaker)
    device = next(model.parameters()).device
    draw = torch.Generator(device).manual_seed(seed)
    done = 0.0

    def before_step(optimizer: Any, step: int) -> None:
        nonlocal done
        done = step / steps
        fallen = max(0.0, done - hold) / max(1 - hold, 1 / steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (final_rate / learning_rate) ** fallen
            group["betas"], group["eps"] = (0.9, 0.999), 1e-6

    def loss_of(running: nn.Module, batch: SpeechBatch) -> Tensor:
        moved = SpeechBatch(*(part.to(device) for part in batch))
        total: Tensor = running(moved, done, draw)["total"]
        return total

    return train_(
        model, batches, loss_of, schedule, progress=progress, name="speech", before_step=before_step, training=True
    )


def tdass(
    model: nn.Module,
    calibration: Iterable[SpeechBatch],
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    target_speaker: int = 0,
    placement: Placement = "memory",
    weight: float = 0.1,
    hidden: int = 256,
    strength: float = 1.0,
    target: float = 1.0,
    non_target: float = -1.0,
    adversary: Adversary = "target",
    guided: float = 0.0,
    steps: int = 100,
    learning_rate: float = 1e-3,
    final_rate: float = 1e-5,
    hold: float = 0.5,
    weight_decay: float = 1e-6,
    clip: float = 1.0,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of a `Tacotron2` that is trained for its target speaker.

    With ``weight=0`` it is trained without the classifier: on all voices the usual way, or on batches of the target alone
    to fine-tune. Source: Zhang et al., 2022, arXiv 2205.11824.

    Args:
        model: left untouched.
        calibration: batches of utterances, `SpeechBatch`.
        teacher: not used; every tuner takes one.
        target_speaker, placement, weight, hidden, strength, target, non_target, adversary, guided: see `TDASS`.
        seed, steps, learning_rate, final_rate, hold, weight_decay, clip, progress: see `train_target_domain_`.

    Raises:
        InputError: a setting outside its range, no target utterance, or batches that are no `SpeechBatch`.
    """
    del teacher
    batches = list(calibration)
    if wrong := [type(batch).__name__ for batch in batches if not isinstance(batch, SpeechBatch)]:
        raise InputError(f"calibration: got batches of type {wrong[0]}, expected SpeechBatch; see speech_batches")
    if not hasattr(model, "config") or not hasattr(model, "num_speakers"):
        raise InputError(f"model: got {type(model).__name__}, expected a Tacotron2")
    share = target_share(batches, target_speaker)
    copy = trainable_copy(model, lambda _name, _tensor: True)
    for module in copy.modules():  # statistics of its own: the copy shares those of `model`
        module._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    learner = TDASS(
        copy, target_speaker, share, placement=placement, weight=weight, hidden=hidden, strength=strength, target=target,
        non_target=non_target, adversary=adversary, guided=guided, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    learner.to(next(model.parameters()).device)
    train_target_domain_(
        learner, batches, steps=steps, learning_rate=learning_rate, final_rate=final_rate, hold=hold,
        weight_decay=weight_decay, clip=clip, seed=seed, progress=progress,
    )  # fmt: skip
    restore_flags_(copy, model)
    return copy.train(model.training)
