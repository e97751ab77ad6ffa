"""Which of several processes this one is, where `torchrun` or ``accelerate launch`` started them."""

from __future__ import annotations

import os

__all__ = ["main_process", "process_count"]


def process_count() -> int:
    """How many processes were started together; 1 for a process on its own."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def main_process() -> bool:
    """Whether this is the process that writes files and speaks: the first of all, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0
