"""The command line: thin commands over the same verbs."""

from layerwright.cli.main import main

__all__ = ["main"]
