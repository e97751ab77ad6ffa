"""What a text GAN's words earn and what its two models lower (DPGAN, SADPGAN)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.train._dpgan_config import GeneratorSamples, check_returns

__all__ = ["Judge", "Writer", "discriminator_loss", "dpgan_returns", "generator_sample"]


class _Model(Protocol):
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


class Writer(_Model, Protocol):
    """What is asked of a generator; a `TextGenerator` has it."""

    @property
    def __call__(self) -> Any: ...
    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]: ...
    def word_log_probs(self, ids: Tensor) -> Tensor: ...


class Judge(_Model, Protocol):
    """What is asked of a discriminator; a `SurpriseDiscriminator` has it."""

    def reward(self, ids: Tensor) -> tuple[Tensor, Tensor]: ...


def dpgan_returns(word: Tensor, sentence: Tensor, gamma: float = 1.0, clip: float | None = None) -> Tensor:
    """``Q_t = sum over u >= t of gamma^u R_s R_w(u)``: what each word of a sentence earns, ``(batch, tokens)``.

    The discount counts from the beginning of the sentence. Words and sentences are clipped alike, before they are
    multiplied. Terms before `t` are left out although `R_s` depends on later words, so that this is no unbiased estimate of
    the gradient of ``E[R_s sum R_w]``.

    Args:
        word: ``R_w``, ``(batch, tokens)``, nats.
        sentence: ``R_s``, ``(batch, 1)``.
        gamma: 0 to 1.
        clip: largest reward; None for none.

    Raises:
        InputError: a number outside its range or shapes that do not fit.
    """
    check_returns(gamma, clip)
    if word.dim() != 2 or sentence.shape != (len(word), 1):
        raise InputError(
            f"word, sentence: got shapes {tuple(word.shape)}, {tuple(sentence.shape)}, expected (batch, tokens), (batch, 1)"
        )
    if clip is not None:
        word, sentence = word.clamp(max=clip), sentence.clamp(max=clip)
    discount = gamma ** torch.arange(word.shape[1], device=word.device, dtype=word.dtype)
    return (word * sentence * discount).flip(1).cumsum(1).flip(1)


def discriminator_loss(judge: Judge, real: Tensor, generated: Tensor, clip: float | None = None) -> Tensor:
    """``-mean R_s(real) + mean R_s(generated)``; with `clip`, surprise of real words above it earns no more.

    Without `clip` the loss has no lower bound.
    """
    both, _ = judge.reward(torch.cat([real, generated]))
    wanted, unwanted = both[: len(real)], both[len(real) :]
    if clip is not None:
        wanted = wanted.clamp(max=clip)
    return unwanted.mean() - wanted.mean()


def generator_sample(
    writer: Writer, real: Tensor, samples: GeneratorSamples = "teacher_argmax", draw: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Words that the generator is rewarded for and their log-probabilities with gradients, both ``(batch, tokens)``.

    Args:
        writer: a `TextGenerator`.
        real: sentences whose prefixes are read; of ``free`` only their number counts.
        samples: see `DPGANConfig`.
        draw: of the draws.
    """
    if samples == "free":
        ids, _ = writer.sample(len(real), draw)
        return ids, writer.word_log_probs(ids)
    logs = writer(real)
    if samples == "teacher_argmax":
        ids = logs.argmax(2)
    else:
        ids = torch.multinomial(logs.detach().exp().flatten(0, 1), 1, generator=draw).view(real.shape)
    return ids, logs.gather(2, ids[..., None])[..., 0]
