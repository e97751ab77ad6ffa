"""A decoder compiled for inference: prompt at once, then token by token, on memory that is allocated once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.treat.engine._attention import bias_of_lengths, bias_of_starts
from layerwright.treat.engine._cache import StaticKVCache
from layerwright.treat.engine._generate import GenerationOutput, generate
from layerwright.treat.engine._prefill import head_logits, hidden_states, run_prompt
from layerwright.treat.engine._program import DecodeStep, plan_workspace
from layerwright.treat.engine._sampling import Sampling
from layerwright.treat.engine._weights import Decoder

__all__ = ["InferenceModel", "Timings"]


@dataclass
class Timings:
    """Tokens and seconds of all calls since the last reset."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    steps: int = 0
    new_tokens: int = 0
    step_seconds: float = 0.0

    def report(self) -> dict[str, float]:
        """Counts, and tokens per second of prompts and of steps."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_per_second": self.prompt_tokens / max(self.prompt_seconds, 1e-9),
            "steps": self.steps,
            "new_tokens": self.new_tokens,
            "ms_per_step": 1e3 * self.step_seconds / max(self.steps, 1),
            "new_tokens_per_second": self.new_tokens / max(self.step_seconds, 1e-9),
        }


@dataclass
class _Lockstep:
    """Rows that share a step counter after `prefill`."""

    rows: int = 0
    bias: Tensor | None = None
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


class InferenceModel:
    """What `compile_inference` returns. One call at a time; results do not depend on earlier calls.

    Two ways of use. In lockstep: `prefill` a batch, padded on the left, then `step` all of it. By rows: `prefill_row`
    and `step_rows` keep sequences of unequal length side by side, which is what a server does.
    """

    def __init__(
        self, decoder: Decoder, cache: StaticKVCache, eos: tuple[int, ...], pad: int | None, chunk: int
    ) -> None:
        self.decoder, self.cache, self.eos_token_ids, self.pad_token_id, self.chunk = decoder, cache, eos, pad, chunk
        self.max_batch, self.max_length = cache.batch, cache.max_length
        self.workspace = plan_workspace(decoder, cache, cache.batch)
        self.timings = Timings()
        device = decoder.embedding.device
        self._logits = torch.zeros(cache.batch, decoder.shape.vocabulary, dtype=decoder.dtype, device=device)
        self._steps: dict[int, DecodeStep] = {}
        self._now = _Lockstep()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.decoder.embedding.device

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read prompts and return the logits after them, ``(n, vocabulary)``; forgets what was read before.

        Args:
            input_ids: ``(n, P)``, n at most ``max_batch``, P at most ``max_length``.
            attention_mask: ``(n, P)``, 0 for padding, which must be on the left; None for no padding.

        Raises:
            InputError: too many or too long prompts, padding on the right, ids outside the vocabulary.
        """
        begun = time.perf_counter()
        ids, starts = self._checked(input_ids, attention_mask)
        rows, tokens = ids.shape
        self.cache.clear()
        self.cache.need(tokens)
        x = self._prompt(ids, 0, 0, starts)
        self.cache.length = tokens
        if starts is not None:
            self.cache.start[:rows] = starts
        self._settle(rows)
        logits = head_logits(self.decoder, x[:, -1])
        self.timings.prompt_tokens += ids.numel()
        self.timings.prompt_seconds += time.perf_counter() - begun
        return logits

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits after one more token a row, ``(n, vocabulary)``. The tensor is the engine's own: the next step writes to it.

        Args:
            tokens: ``(n,)``, as many as there were prompts.

        Raises:
            InputError: nothing was read before, another number of rows, or a full cache (nothing is written then).
        """
        begun = time.perf_counter()
        now = self._now
        if not now.rows:
            raise InputError("step: nothing was read yet; call prefill first")
        if tokens.shape != (now.rows,):
            raise InputError(f"tokens: got shape {tuple(tokens.shape)}, expected ({now.rows},), one for each prompt")
        self.cache.need(1)
        place = self.cache.length
        bias = None if now.bias is None else now.bias[:, :, : place + 1]
        logits = self._step(now.rows)(tokens, now.positions, place + 1, place, bias)
        self.cache.length = place + 1
        now.positions += 1
        self._count(now.rows, begun)
        return logits

    @torch.inference_mode()
    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm, ``(n, P, hidden)``, with causal attention; the cache is left alone.

        Those of padded places mean nothing. Args and errors as `prefill`.
        """
        ids, starts = self._checked(input_ids, attention_mask)
        return hidden_states(self.decoder, run_prompt(self.decoder, ids, None, starts=starts))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        sampling: Sampling | None = None,
        *,
        generator: torch.Generator | None = None,
        streamer: Callable[[Tensor], None] | None = None,
    ) -> GenerationOutput:
        """Continue prompts; the tokens are those of ``transformers.generate`` with the same settings.

        Args:
            input_ids, attention_mask: as `prefill`.
            max_new_tokens: at least 1.
            sampling: greedy by default.
            generator: of the draws; needed with a temperature.
            streamer: called with the new tokens ``(n,)`` of each step; not with beams.

        Raises:
            InputError: as `prefill`; prompt and new tokens longer than ``max_length``; more beams than rows.
        """
        return generate(self, input_ids, attention_mask, max_new_tokens, sampling or Sampling(), generator, streamer)

    @torch.inference_mode()
    def prefill_row(self, row: int, ids: Tensor, place: int = 0) -> Tensor:
        """Read (a further part of) a prompt ``(P,)`` into one row, from its place `place` on: logits ``(vocabulary,)``."""
        begun = time.perf_counter()
        if not 0 <= row < self.max_batch:
            raise InputError(f"row: got {row}, expected 0 to {self.max_batch - 1}")
        self._now = _Lockstep()  # rows no longer share a counter
        ids, _ = self._checked(ids[None], None)
        self.cache.need(ids.shape[1], place)
        x = self._prompt(ids, row, place, None)
        self.timings.prompt_tokens += ids.numel()
        logits = head_logits(self.decoder, x[:, -1])[0]
        self.timings.prompt_seconds += time.perf_counter() - begun
        return logits

    @torch.inference_mode()
    def step_rows(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """One more token for each of the first rows, whose caches hold `lengths` tokens: logits ``(n, vocabulary)``.

        Args:
            tokens, lengths: ``(n,)``; the caller counts.

        Raises:
            InputError: a full row (nothing is written then).
        """
        begun = time.perf_counter()
        rows = len(tokens)
        if not 1 <= rows <= self.max_batch or tokens.shape != lengths.shape or tokens.dim() != 1:
            raise InputError(
                f"tokens, lengths: got {tuple(tokens.shape)} and {tuple(lengths.shape)}, expected (n,) each"
            )
        longest = int(lengths.max())
        self.cache.need(1, longest)
        even = bool((lengths == longest).all())
        bias = None
        if not even:
            bias = bias_of_lengths(lengths + 1, longest + 1, self.decoder.shape.kv_heads, self.decoder.dtype)
        logits = self._step(rows)(tokens, lengths, longest + 1, longest if even else lengths, bias)
        self._count(rows, begun)
        return logits

    def reorder(self, index: Tensor, since: int = 0) -> None:
        """Let row `i` go on from row ``index[i]``; see `StaticKVCache.reorder`. Rows may become more."""
        with torch.inference_mode():
            self.cache.reorder(index, since)
            self._settle(len(index))

    def truncate(self, length: int) -> None:
        """Go back to the first `length` places of all rows; see `StaticKVCache.truncate`."""
        self.cache.truncate(length)
        self._settle(self._now.rows)

    def memory_report(self) -> dict[str, int]:
        """Bytes of weights, cache and workspace, what the workspace would be without reuse, and their sum at the peak.

        ``prompt`` bounds the results of one block while a prompt is read, which are not kept.
        """
        shape, size = self.decoder.shape, self.decoder.dtype.itemsize
        steps = self._logits.nbytes + sum(s.x.nbytes + s.turns.nbytes for s in self._steps.values())
        widest = max(2 * b.up.rows + b.qkv.rows for b in self.decoder.blocks)
        prompt = min(self.chunk, self.max_batch * self.max_length) * (widest + 4 * shape.hidden) * size
        report = {
            "weights": self.decoder.nbytes,
            "cache": self.cache.nbytes,
            "workspace": self.workspace.nbytes,
            "workspace_without_reuse": self.workspace.layout.separate,
            "logits_and_stream": steps,
            "prompt": prompt,
        }
        return report | {"peak": sum(v for k, v in report.items() if k != "workspace_without_reuse")}

    def timing_report(self) -> dict[str, float]:
        """Tokens per second of prompts and of steps since the engine was made; see `Timings`."""
        return self.timings.report()

    def _prompt(self, ids: Tensor, row: int, place: int, starts: Tensor | None) -> Tensor:
        """Hidden states of the last part; at most `chunk` tokens at a time, which bounds what they take."""
        part = max(1, self.chunk // len(ids))
        for begin in range(0, ids.shape[1], part):
            piece = ids[:, begin : begin + part]
            x = run_prompt(self.decoder, piece, self.cache, first_row=row, place=place + begin, starts=starts)
        return x

    def _settle(self, rows: int) -> None:
        """Positions and mask of rows in lockstep, made once after a prompt and not for each layer or step."""
        starts = self.cache.start[:rows]
        padded = bool(starts.any())
        shape = self.decoder.shape
        bias = bias_of_starts(starts, self.max_length, shape.kv_heads, self.decoder.dtype) if padded else None
        self._now = _Lockstep(rows, bias, self.cache.length - starts)

    def _step(self, rows: int) -> DecodeStep:
        if rows not in self._steps:
            logits = self._logits[:rows]
            self._steps[rows] = DecodeStep(self.decoder, self.cache, self.workspace.buffer, rows, logits)
        return self._steps[rows]

    def _count(self, rows: int, begun: float) -> None:
        self.timings.steps += 1
        self.timings.new_tokens += rows
        self.timings.step_seconds += time.perf_counter() - begun

    def _checked(self, input_ids: Any, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids on the engine's device, and padded places of each row (None for no padding)."""
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
            raise InputError("input_ids: expected whole numbers (batch, tokens)")
        rows, tokens = input_ids.shape
        if not 1 <= rows <= self.max_batch:
            raise InputError(f"input_ids: got {rows} sequences, expected 1 to max_batch {self.max_batch}")
        if not 1 <= tokens <= self.max_length:
            raise InputError(f"input_ids: got {tokens} tokens, expected 1 to max_length {self.max_length}")
        ids = input_ids.to(self.device, torch.long)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.decoder.shape.vocabulary:
            wrong = low if low < 0 else high
            raise InputError(f"input_ids: token {wrong} is outside the vocabulary of {self.decoder.shape.vocabulary}")
        return ids, None if attention_mask is None else _starts(attention_mask.to(self.device), ids)


def _starts(mask: Tensor, ids: Tensor) -> Tensor | None:
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask: got shape {tuple(mask.shape)}, expected {tuple(ids.shape)}")
    real = mask != 0
    if bool((real[:, 1:] < real[:, :-1]).any()):
        raise InputError("attention_mask: padding must be on the left; set tokenizer.padding_side = 'left'")
    if not bool(real[:, -1].all()):
        raise InputError("attention_mask: a sequence has no tokens; give each at least one")
    starts = (~real).sum(1)
    return starts if bool(starts.any()) else None
