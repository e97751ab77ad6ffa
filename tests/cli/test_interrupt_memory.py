"""Ctrl-C that native code turned into something else, or dropped, still stops the run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable

import pytest

from layerwright.cli import console, interrupt, main


def test_an_error_after_ctrl_c_is_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from layerwright.cli import app as commands

    def replaced(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    monkeypatch.setattr(commands, "app", replaced)
    assert main(["recipes"]) == 130
    said = capsys.readouterr().err
    assert "interrupted" in said and "shape" not in said


@pytest.mark.parametrize("quiet", [True, False])
def test_a_dropped_ctrl_c_stops_at_the_next_step(quiet: bool) -> None:
    def run(progress: Callable[[str, int, int], None]) -> None:
        progress("first", 1, 3)
        with contextlib.suppress(KeyboardInterrupt):  # as in a callback whose exceptions are ignored
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            progress("second", 2, 3)

    with interrupt.remembered_interrupts() as seen, console.progress_to(quiet) as progress:
        run(progress)
        assert seen.seen
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_user_stays() -> None:
    def own(*_: object) -> None:
        raise AssertionError("not called here")

    before = signal.signal(signal.SIGINT, own)
    try:
        with interrupt.remembered_interrupts():
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
