"""The two language models of a text GAN that rewards surprise: one writes, the other is surprised or not (DPGAN)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.sequence_core import CoreKind, CoreState, SequenceCore

__all__ = ["SurpriseDiscriminator", "TextGenerator"]

TextInit = Literal["auto", "scaled_normal", "torch", "unit"]


class _TextModel(nn.Module):
    """``p(y_t | y_<t)`` of sentences of a fixed length, padding included: embedding, core, projection to words."""

    def __init__(
        self,
        vocabulary: int,
        embed_dim: int = 32,
        hidden: int = 32,
        max_len: int = 20,
        core: CoreKind | SequenceCore = "lstm",
        start_id: int = 1,
        pad_id: int = 0,
        *,
        init: TextInit = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(vocabulary, max_len, start_id, pad_id, init)
        if isinstance(core, SequenceCore):
            if (core.dim, core.hidden) != (embed_dim, hidden):
                raise InputError(
                    f"core: reads {core.dim} and writes {core.hidden} features, expected embed_dim={embed_dim}, hidden={hidden}"
                )
            if core.kind == "transformer" and core.max_len < max_len:
                raise InputError(f"core: holds {core.max_len} tokens, expected at least max_len={max_len}")
        else:
            core = SequenceCore(core, embed_dim, hidden, max_len=max_len, seed=seed)
        self.vocabulary, self.max_len, self.start_id, self.pad_id = vocabulary, max_len, start_id, pad_id
        self.core = core
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, embed_dim, padding_idx=pad_id)
            self.project = nn.Linear(hidden, vocabulary)
            self._start_(init)

    @torch.no_grad()
    def _start_(self, init: TextInit) -> None:
        recurrent = self.core.kind != "transformer"
        if init == "auto":
            init = "scaled_normal" if recurrent else "unit" if self.core.norm == "pre" else "torch"
        if init == "scaled_normal":
            for parameter in self.parameters():
                parameter.normal_(0, parameter.shape[0] ** -0.5)
        elif init == "unit":
            self.embedding.weight.normal_(0, self.embedding.embedding_dim**-0.5)
            self.embedding.weight[self.pad_id] = 0

    def forward(self, ids: Tensor) -> Tensor:
        """Log-probabilities ``(batch, tokens, vocabulary)`` of each word of `ids` ``(batch, tokens)`` given those before it.

        The start symbol is put in front and the last word is not read, so that position `t` never sees ``ids[:, t:]``.

        Raises:
            InputError: longer than `max_len`, or ids outside the vocabulary.
        """
        return self._read(self._shifted(ids), None)[0].log_softmax(-1)

    def word_log_probs(self, ids: Tensor) -> Tensor:
        """``log p(y_t | y_<t)``, ``(batch, tokens)``, of the words `ids` themselves; errors as in `forward`."""
        logits, _ = self._read(self._shifted(ids), None)
        return -F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)

    def _shifted(self, ids: Tensor) -> Tensor:
        self._check_ids(ids)
        return torch.cat([ids.new_full((len(ids), 1), self.start_id), ids[:, :-1]], 1)

    def _read(self, ids: Tensor, state: CoreState | None) -> tuple[Tensor, CoreState]:
        out, state = self.core(self.embedding(ids), state)
        logits = self.project(out)
        return logits if logits.dtype == torch.float64 else logits.float(), state

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.is_floating_point():
            raise InputError(
                f"ids: got {ids.dtype} of shape {tuple(ids.shape)}, expected whole numbers (batch, tokens)"
            )
        if not 1 <= ids.shape[1] <= self.max_len:
            raise InputError(f"ids: got {ids.shape[1]} tokens, expected 1 to max_len={self.max_len}; cut the sentences")
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.vocabulary):
            raise InputError(
                f"ids: got {int(ids.min())} to {int(ids.max())}, expected 0 to {self.vocabulary - 1}, the vocabulary's"
            )

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "vocabulary": self.vocabulary,
            "embed_dim": self.core.dim,
            "hidden": self.core.hidden,
            "max_len": self.max_len,
            "core": self.core.spec(),
            "start_id": self.start_id,
            "pad_id": self.pad_id,
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """A model of that form."""
        return cls(**{**spec, "core": SequenceCore.empty(spec["core"])})


class TextGenerator(_TextModel):
    """Writes sentences word by word; every sentence has `max_len` positions, padding being a word like others.

    ``forward(ids) -> log-probabilities``; `sample` draws. The core is exchangeable and everything else stays the same:
    DPGAN (Xu et al., 2018, arXiv 1802.01345) with an LSTM, SADPGAN (Blin and Kucharavy, 2021, arXiv 2108.12275) with a
    transformer.

    Args:
        vocabulary: words, with the start symbol and padding.
        embed_dim, hidden: features of a word and of the core.
        max_len: positions of a sentence.
        core: ``lstm``, ``gru``, ``transformer`` or a `SequenceCore`.
        start_id, pad_id: symbols before the first word and after the last.
        init: ``scaled_normal``, every number with deviation ``1 / sqrt(first dimension)``; ``torch``; ``unit``, embeddings
            whose scaled entries have variance 1. ``auto`` takes the first for recurrent cores, the second for a
            transformer of norm ``post`` (both as in the public codes), and the third for one of norm ``pre``.
        seed: of the weights; the global generator is left alone.

    Raises:
        InputError: a number outside its range, `start_id` equal to `pad_id`, a core that does not fit.
    """

    @torch.no_grad()
    def sample(
        self,
        count: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        *,
        cached: bool = True,
        batch: int = 1024,
    ) -> tuple[Tensor, Tensor]:
        """Sentences ``(count, max_len)`` and the log-probabilities ``(count, max_len)`` of their words at that temperature.

        Args:
            count: sentences, at least 1.
            generator: of the draws.
            temperature: logits are divided by it, above 0.
            cached: step by step with the state of the core; False reads the whole prefix again for each word.
            batch: sentences at a time; draws depend on it.

        Raises:
            InputError: a number outside its range.
        """
        if count < 1 or batch < 1 or not temperature > 0:
            raise InputError(
                f"count, batch, temperature: got {count}, {batch}, {temperature}, expected at least 1, at least 1, above 0"
            )
        parts = [
            self._draw(min(batch, count - begin), generator, temperature, cached) for begin in range(0, count, batch)
        ]
        return torch.cat([ids for ids, _ in parts]), torch.cat([logs for _, logs in parts])

    def _draw(
        self, count: int, generator: torch.Generator | None, temperature: float, cached: bool
    ) -> tuple[Tensor, Tensor]:
        ids = torch.full((count, self.max_len + 1), self.start_id, device=self.embedding.weight.device)
        parts = []
        state = self.core.init_state(count)
        for place in range(self.max_len):
            if cached:
                words, state = self._read(ids[:, place : place + 1], state)
            else:
                words, _ = self._read(ids[:, : place + 1], None)
            words = (words[:, -1] / temperature).log_softmax(-1)
            drawn = torch.multinomial(words.exp(), 1, generator=generator)
            ids[:, place + 1 : place + 2] = drawn
            parts.append(words.gather(1, drawn))
        return ids[:, 1:], torch.cat(parts, 1)


class SurpriseDiscriminator(_TextModel):
    """A language model whose surprise is the reward: `reward` gives it by word and by sentence.

    It is trained to be surprised by real text and unsurprised by generated text, so that repetition earns little. Arguments
    and errors are those of `TextGenerator`. Xu et al., 2018, arXiv 1802.01345.
    """

    def reward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``-log D(y_t | y_<t)`` in nats, ``(batch, tokens)``, and its mean over all positions, ``(batch, 1)``.

        Raises:
            InputError: longer than `max_len`, or ids outside the vocabulary.
        """
        word = -self.word_log_probs(ids)
        return word, word.mean(1, keepdim=True)


def _check(vocabulary: int, max_len: int, start_id: int, pad_id: int, init: str) -> None:
    if vocabulary < 3:
        raise InputError(f"vocabulary: got {vocabulary}, expected at least 3: start, padding and a word")
    if max_len < 1:
        raise InputError(f"max_len: got {max_len}, expected at least 1")
    for name, value in (("start_id", start_id), ("pad_id", pad_id)):
        if not 0 <= value < vocabulary:
            raise InputError(f"{name}: got {value}, expected 0 to {vocabulary - 1}")
    if start_id == pad_id:
        raise InputError(f"start_id, pad_id: both are {start_id}, expected two symbols")
    if init not in get_args(TextInit):
        raise unknown_name("init", init, get_args(TextInit))
