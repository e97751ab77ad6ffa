"""The generation loop: greedy or drawn; beams are in `_beams`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.treat.engine._beams import search
from layerwright.treat.engine._sampling import Sampling, choose

if TYPE_CHECKING:
    from layerwright.treat.engine._model import InferenceModel

__all__ = ["GenerationOutput", "generate"]


@dataclass(frozen=True)
class GenerationOutput:
    """What was generated.

    Attributes:
        tokens: prompts and new tokens ``(n, tokens)``; rows that ended early are filled up with the padding token.
        lengths: new tokens of each row ``(n,)``, the end of text among them.
        scores: of the best hypotheses ``(n,)`` with beams, else None.
        seconds: of the prompt and of all steps.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor | None
    seconds: tuple[float, float]


def generate(
    engine: InferenceModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    streamer: Callable[[Tensor], None] | None,
) -> GenerationOutput:
    """See `InferenceModel.generate`."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    if input_ids.dim() == 2 and input_ids.shape[1] + max_new_tokens > engine.max_length:
        raise InputError(
            f"max_new_tokens: {input_ids.shape[1]} tokens and {max_new_tokens} more exceed max_length {engine.max_length}"
        )
    if sampling.temperature > 0 and generator is None:
        raise InputError("generator: a temperature draws tokens; give a torch.Generator with a seed")
    with torch.inference_mode():
        if sampling.num_beams > 1:
            if streamer is not None:
                raise InputError("streamer: beams have no token before they end; leave it out")
            return _searched(engine, input_ids, attention_mask, max_new_tokens, sampling)
        return _drawn(engine, input_ids, attention_mask, max_new_tokens, sampling, generator, streamer)


def _drawn(
    engine: InferenceModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    count: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    streamer: Callable[[Tensor], None] | None,
) -> GenerationOutput:
    begun = time.perf_counter()
    logits = engine.prefill(input_ids, attention_mask)
    prompted = time.perf_counter()
    rows, prompt = input_ids.shape
    ends = torch.tensor(engine.eos_token_ids, device=engine.device)
    pad = fill_token(engine)
    tokens = torch.full((rows, prompt + count), pad, device=engine.device)
    tokens[:, :prompt] = input_ids
    open_rows = torch.ones(rows, dtype=torch.bool, device=engine.device)
    lengths = torch.zeros(rows, dtype=torch.long, device=engine.device)
    made = 0
    while True:
        chosen = choose(logits, sampling, generator)
        if len(ends):
            chosen = torch.where(open_rows, chosen, pad)
        tokens[:, prompt + made] = chosen
        lengths += open_rows
        made += 1
        if streamer is not None:
            streamer(chosen.clone())
        if len(ends):
            open_rows &= ~torch.isin(chosen, ends)
        if made == count or (len(ends) and not bool(open_rows.any())):
            break
        logits = engine.step(chosen)
    seconds = (prompted - begun, time.perf_counter() - prompted)
    return GenerationOutput(tokens[:, : prompt + made].clone(), lengths, None, seconds)


def _searched(
    engine: InferenceModel, input_ids: Tensor, attention_mask: Tensor | None, count: int, sampling: Sampling
) -> GenerationOutput:
    rows = input_ids.shape[0] * sampling.num_beams
    if rows > engine.max_batch:
        raise InputError(
            f"num_beams: {input_ids.shape[0]} prompts of {sampling.num_beams} beams are {rows} rows, more than max_batch "
            f"{engine.max_batch}"
        )
    begun = time.perf_counter()
    logits = engine.prefill(input_ids, attention_mask)
    prompted = time.perf_counter()
    fill = engine.pad_token_id or (engine.eos_token_ids[0] if engine.eos_token_ids else 0)  # as transformers: not 0
    new, lengths, scores = search(engine, logits, count, sampling, fill)
    seconds = (prompted - begun, time.perf_counter() - prompted)
    tokens = torch.cat([input_ids.to(new), new[:, : int(lengths.max())]], 1)
    return GenerationOutput(tokens, lengths, scores, seconds)


def fill_token(engine: InferenceModel) -> int:
    """What rows that ended are filled up with."""
    if engine.pad_token_id is not None:
        return engine.pad_token_id
    return engine.eos_token_ids[0] if engine.eos_token_ids else 0
