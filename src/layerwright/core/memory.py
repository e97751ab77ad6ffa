"""Peak memory of this process."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

__all__ = ["peak_memory_bytes", "release_free_memory", "reset_peak_memory", "resident_bytes"]


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def peak_memory_bytes() -> int:
    """The largest resident size of this process since the last reset, in bytes."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """The resident size of this process now, in bytes; the peak where the system does not say."""
    return _status("VmRSS") or peak_memory_bytes()


def reset_peak_memory() -> bool:
    """Start the peak again from the resident size of now (Linux); False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def release_free_memory() -> None:
    """Hand freed memory back to the system.

    The C library keeps what large tensors leave behind in pieces between smaller ones; over many blocks that grows to
    the size of the model. Does nothing where the C library has no such call.
    """
    gc.collect()
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _c_library() -> object:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
