"""Requests of OpenAI's interface: what is understood, what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwright.core.errors import InputError
from layerwright.treat.engine import Sampling

__all__ = ["Limits", "Wanted", "read_chat", "read_completion"]

_MAX_STOPS, _MAX_STOP_LENGTH = 4, 256
_COLDEST = 1e-4
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
}
"""Fields that would change the answer and that are not there, with the values that change nothing."""


@dataclass(frozen=True)
class Limits:
    """What the server accepts.

    Attributes:
        queue: requests that wait for a slot at most; more get 429.
        max_body_bytes: of a request; larger ones get 413.
        body_seconds: in which a request's body must arrive; slower ones get 408.
    """

    queue: int = 64
    max_body_bytes: int = 1 << 20
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (("queue", 0), ("max_body_bytes", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if not self.body_seconds > 0:
            raise InputError(f"body_seconds: got {self.body_seconds}, expected more than 0")


@dataclass(frozen=True)
class Wanted:
    """A request, understood.

    Attributes:
        model: as the client names it.
        prompt: text, or token ids; None for a chat.
        messages: role and text of each message; None for a completion.
        max_tokens: None for what fits.
        sampling: how tokens are chosen.
        seed: None to draw one.
        stop: texts before which the answer ends.
        stream: whether it comes in pieces.
        usage: whether a stream ends with counts.
    """

    model: str
    prompt: str | tuple[int, ...] | None
    messages: tuple[tuple[str, str], ...] | None
    max_tokens: int | None
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool


def read_completion(data: Any) -> Wanted:
    """A request to ``/v1/completions``.

    Raises:
        InputError: a field that is missing, of the wrong kind, or not supported; it is named first in the message.
    """
    _is_object(data)
    prompt = data.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list) and all(_is_whole(token) for token in prompt):
        return _wanted(data, tuple(prompt), None, 16)
    if not isinstance(prompt, str):
        raise InputError(
            "prompt: expected one text, or one list of token ids; send several prompts as several requests"
        )
    return _wanted(data, prompt, None, 16)


def read_chat(data: Any) -> Wanted:
    """A request to ``/v1/chat/completions``; errors as `read_completion`."""
    _is_object(data)
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("messages: expected a list of at least one message")
    return _wanted(data, None, tuple(_message(message) for message in messages), None)


def _is_object(data: Any) -> None:
    if not isinstance(data, dict):
        raise InputError("body: expected a JSON object")


def _message(message: Any) -> tuple[str, str]:
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "".join(t for t in texts if isinstance(t, str)) if all(isinstance(t, str) for t in texts) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError("messages: each needs a role and a content of text")
    return role, content


def _wanted(
    data: Mapping[str, Any],
    prompt: str | tuple[int, ...] | None,
    messages: tuple[tuple[str, str], ...] | None,
    default_tokens: int | None,
) -> Wanted:
    for name, harmless in _REFUSED.items():
        if data.get(name) not in harmless:
            raise InputError(f"{name}: not supported by this server; leave it out")
    model = data.get("model")
    if not isinstance(model, str):
        raise InputError("model: expected the name of a model, see /v1/models")
    limit = data.get("max_completion_tokens", data.get("max_tokens"))
    if limit is not None and (not _is_whole(limit) or limit < 1):
        raise InputError("max_tokens: expected a whole number of at least 1")
    seed = data.get("seed")
    if seed is not None and not _is_whole(seed):
        raise InputError("seed: expected a whole number")
    options = data.get("stream_options") or {}
    if not isinstance(options, dict):
        raise InputError("stream_options: expected an object")
    return Wanted(
        model=model,
        prompt=prompt,
        messages=messages,
        max_tokens=default_tokens if limit is None else limit,
        sampling=_sampling(data),
        seed=None if seed is None else seed % (1 << 63),
        stop=_stops(data.get("stop")),
        stream=_flag(data, "stream"),
        usage=_flag(options, "include_usage"),
    )


def _sampling(data: Mapping[str, Any]) -> Sampling:
    temperature, top_p, top_k = (data.get(name) for name in ("temperature", "top_p", "top_k"))
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise InputError(f"{name}: expected a number")
    if top_k is not None and not _is_whole(top_k):
        raise InputError("top_k: expected a whole number")
    if temperature is not None and temperature > 100:
        raise InputError("temperature: expected at most 100")
    if temperature is not None and 0 <= temperature < _COLDEST:
        temperature = 0.0  # logits over so little would not be finite
    return Sampling(
        1.0 if temperature is None else float(temperature), top_k or 0, 1.0 if top_p is None else float(top_p)
    )


def _stops(stop: Any) -> tuple[str, ...]:
    found: Sequence[Any] = () if stop is None else [stop] if isinstance(stop, str) else stop
    fits = isinstance(found, (list, tuple)) and len(found) <= _MAX_STOPS
    if not fits or any(not isinstance(text, str) or not 1 <= len(text) <= _MAX_STOP_LENGTH for text in found):
        raise InputError(f"stop: expected a text or up to {_MAX_STOPS} texts of 1 to {_MAX_STOP_LENGTH} characters")
    return tuple(found)


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{name}: expected true or false")
    return bool(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
