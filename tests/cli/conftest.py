"""The command line in tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from layerwright.cli import main


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed; returns its standard output."""

    def run(*arguments: str | Path) -> str:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run
