"""Answers of OpenAI's interface as plain data."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "chat_answer", "completion_answer"]


@dataclass(frozen=True)
class Answer:
    """One answer, whole or in pieces.

    Attributes:
        model: its name.
        prompt_tokens: of the request.
        chat: whether it is a message rather than a text.
        name: of the answer.
        created: in seconds since 1970.
    """

    model: str
    prompt_tokens: int
    chat: bool
    name: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def first(self) -> dict[str, Any]:
        """What opens a stream."""
        return self._chunk(self._choice({"role": "assistant", "content": ""} if self.chat else "", None))

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of text."""
        return self._chunk(self._choice({"content": text} if self.chat else text, None))

    def end(self, reason: str) -> dict[str, Any]:
        """What closes a stream."""
        return self._chunk(self._choice({} if self.chat else "", reason))

    def usage(self, tokens: int) -> dict[str, Any]:
        """Counts, after the end of a stream."""
        return self._chunk() | {"usage": self._usage(tokens)}

    def whole(self, text: str, reason: str, tokens: int) -> dict[str, Any]:
        """The answer in one piece."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": reason, "logprobs": None}
        return self._head("chat.completion" if self.chat else "text_completion") | {
            "choices": [choice],
            "usage": self._usage(tokens),
        }

    def _choice(self, content: Any, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta" if self.chat else "text": content, "finish_reason": reason, "logprobs": None}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion") | {"choices": list(choices)}

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.name}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def _usage(self, tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }


def completion_answer(model: str, prompt_tokens: int) -> Answer:
    """An answer of ``/v1/completions``."""
    return Answer(model, prompt_tokens, chat=False)


def chat_answer(model: str, prompt_tokens: int) -> Answer:
    """An answer of ``/v1/chat/completions``."""
    return Answer(model, prompt_tokens, chat=True)
