"""Text from tokens, piece by piece, and where it stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream", "chat_prompt"]

_UNFINISHED = "\ufffd"
_MAX_HELD = 8
"""Tokens that are held back for an unfinished character at most: then they are no part of one."""


class TextStream:
    """Decodes tokens as they come. Holds back half characters, and what may be the beginning of a stop text.

    Args:
        tokenizer: of transformers.
        stop: texts that end the answer; they are no part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.stopped = False
        self._context = self._shown = 0
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain after one more token; may be empty."""
        self.ids.append(token)
        before = self._decode(self._context, self._shown)
        now = self._decode(self._context, len(self.ids))
        if now.endswith(_UNFINISHED) and len(self.ids) - self._shown < _MAX_HELD:
            return ""
        self._context, self._shown = self._shown, len(self.ids)
        return self._until_stop(now[len(before) :])

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        before = self._decode(self._context, self._shown)
        rest = self._decode(self._context, len(self.ids))[len(before) :]
        text = self._until_stop(rest)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decode(self, first: int, last: int) -> str:
        text: str = self.tokenizer.decode(self.ids[first:last], skip_special_tokens=True)
        return text

    def _until_stop(self, new: str) -> str:
        text = self._held + new
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)


def chat_prompt(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of a chat: by the tokenizer's own template, else ``role: text`` lines and ``assistant:``."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": role, "content": text} for role, text in messages]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = "".join(f"{role}: {text}\n" for role, text in messages) + "assistant:"
    return list(tokenizer(text)["input_ids"])
