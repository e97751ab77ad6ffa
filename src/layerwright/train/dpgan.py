"""Train a text GAN whose reward is the surprise of a language model (DPGAN, SADPGAN): policy gradient in rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.train._dpgan_config import DivergedError, DPGANConfig, DPGANHistory, EpochRecord, Phase
from layerwright.train._dpgan_rewards import Judge, Writer, discriminator_loss, dpgan_returns, generator_sample
from layerwright.train._dpgan_run import Run

__all__ = [
    "DPGANConfig",
    "DPGANHistory",
    "DivergedError",
    "EpochRecord",
    "discriminator_loss",
    "dpgan_returns",
    "generator_sample",
    "train_dpgan",
]

Progress = Callable[[str, int, int], None]


def train_dpgan(
    generator: Writer,
    discriminator: Judge,
    data: Tensor,
    config: DPGANConfig | None = None,
    *,
    heldout: Tensor | None = None,
    evaluate: Callable[[Tensor], Mapping[str, float]] | None = None,
    stop: Callable[[Mapping[str, float]], str | None] | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> DPGANHistory:
    """Train both in place: maximum likelihood, then the discriminator, then in turns.

    The generator lowers ``sum over batch and t of -log G(y_t) Q_t`` (see `dpgan_returns`), the discriminator
    `discriminator_loss` on real and freshly generated sentences. Same seed, same weights.

    Source: Xu, Ren, Lin and Sun, 2018, arXiv 1802.01345; Blin and Kucharavy, 2021, arXiv 2108.12275.

    Args:
        generator: a `TextGenerator`, or what has its `forward`, `sample` and `word_log_probs`.
        discriminator: a `SurpriseDiscriminator`, or what has its `reward`.
        data: real sentences ``(sentences, tokens)`` of ids, padded to the generator's `max_len`.
        config: see `DPGANConfig`.
        heldout: sentences of `nll_gen`; None for `data`.
        evaluate: further measurements of samples ``(eval_samples, tokens)``, such as `explain.diversity_against` returns.
        stop: looks at an adversarial record's values and returns why to stop, or None; such as `explain.collapse_reason`.
        folder: where the state is kept after every epoch; a call with one that holds a state goes on from there, and ends at
            once if that run had ended.
        progress: ``progress(phase, done, total)``.

    Raises:
        InputError: sentences that do not fit the generator, fewer than a batch, or a folder of another configuration.
        DivergedError: a reward or a loss is not finite; names phase and epoch.
    """
    config = config or DPGANConfig()
    _check_data(generator, data, heldout, config)
    run = Run(generator, discriminator, data, config, heldout, evaluate, Path(folder) if folder is not None else None)
    run.resume()
    plan: list[tuple[Phase, int, Callable[[], dict[str, float]]]] = [
        ("mle", config.mle_epochs, run.mle_epoch),
        ("discriminator", config.d_pre_steps, lambda: run.discriminator_step(config.d_pre_epochs)),
        ("adversarial", config.adversarial_epochs, run.adversarial_epoch),
    ]
    begun = next((number for number, (phase, _, _) in enumerate(plan) if phase == run.phase), 0)
    for phase, epochs, epoch_of in plan[begun:]:
        first = run.epoch if phase == run.phase else 0
        for epoch in range(first + 1, epochs + 1):
            if run.history.reason:
                return run.history
            run.phase, run.epoch = phase, epoch
            values = epoch_of()
            if epoch % config.eval_every == 0 or epoch == epochs:
                run.history.records.append(EpochRecord(phase, epoch, values | run.measure()))
                if stop and phase == "adversarial" and (why := stop(run.history.records[-1].values)):
                    run.history.reason = f"stopped after adversarial epoch {epoch}: {why}"
            if phase == "adversarial" and epoch == epochs and not run.history.reason:
                run.history.reason = "finished"
            run.save()
            if progress:
                progress(phase, epoch, epochs)
    run.history.reason = run.history.reason or "finished"
    return run.history


def _check_data(generator: Writer, data: Tensor, heldout: Tensor | None, config: DPGANConfig) -> None:
    for name, ids, least in (("data", data, config.batch), ("heldout", heldout, 1)):
        if ids is None:
            continue
        if ids.dim() != 2 or ids.is_floating_point() or len(ids) < least:
            raise InputError(
                f"{name}: got {ids.dtype} of shape {tuple(ids.shape)}, expected ids (sentences, tokens), at least {least} sentences"
            )
        wanted, size = getattr(generator, "max_len", ids.shape[1]), getattr(generator, "vocabulary", None)
        if ids.shape[1] != wanted:
            raise InputError(
                f"{name}: got sentences of {ids.shape[1]} positions, expected max_len={wanted}; pad or cut them"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (size is not None and high >= size):
            raise InputError(f"{name}: got ids from {low} to {high}, expected 0 to {size and size - 1}")
