"""Ctrl-C that cannot get lost: the first one stops the run even where native code swallows the exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupts", "remembered_interrupts"]


class Interrupts:
    """Whether Ctrl-C was pressed.

    Python raises `KeyboardInterrupt` wherever the main thread happens to be. Inside a callback of native code the exception
    may be replaced by another one, or dropped; this remembers it, so that the caller can tell and `stop_if_seen` can repeat it.
    """

    def __init__(self) -> None:
        self.seen = False

    def stop_if_seen(self) -> None:
        """Raises `KeyboardInterrupt` again when one was dropped on its way up."""
        if self.seen:
            raise KeyboardInterrupt

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt


current = Interrupts()


@contextmanager
def remembered_interrupts() -> Iterator[Interrupts]:
    """Remember Ctrl-C until the end of the block; outside the main thread, and where the user set a handler, nothing changes."""
    current.seen = False
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not default or threading.current_thread() is not threading.main_thread():
        yield current
        return
    signal.signal(signal.SIGINT, current._handle)
    try:
        yield current
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
