"""What a run will take, computed before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Forecast"]


@dataclass(frozen=True)
class Forecast:
    """Peak memory, time and disk of a run; made from per-layer shapes, compared with what was measured after it.

    Attributes:
        peak_memory_bytes: largest resident size of the process.
        seconds: wall time.
        disk_bytes: what is on disk at the fullest moment, state of the run included.
        output_bytes: size of the finished checkpoint's tensors.
        finished_bytes: size of the finished folder, everything in it.
    """

    peak_memory_bytes: float
    seconds: float
    disk_bytes: float
    output_bytes: float = 0.0
    finished_bytes: float = 0.0

    def to_data(self) -> dict[str, float]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        finished = self.finished_bytes or self.disk_bytes
        more = f" ({self.disk_bytes / 1e6:,.1f} MB while it runs)" if self.disk_bytes > 1.05 * finished else ""
        return (
            f"forecast: peak memory {self.peak_memory_bytes / 1e9:.2f} GB, {self.seconds:.0f} s, "
            f"{finished / 1e6:,.1f} MB on disk{more}"
        )

    def compare(self, peak_memory_bytes: float, seconds: float, disk_bytes: float) -> str:
        """One line: forecast against measured, with ratios.

        Args:
            peak_memory_bytes, seconds: of the run.
            disk_bytes: of the finished folder.
        """
        finished = self.finished_bytes or self.disk_bytes
        pairs = (
            ("peak memory", self.peak_memory_bytes / 1e9, peak_memory_bytes / 1e9, "GB"),
            ("time", self.seconds, seconds, "s"),
            ("disk", finished / 1e6, disk_bytes / 1e6, "MB"),
        )
        return "; ".join(
            f"{name} forecast {expected:.2f} {unit}, measured {measured:.2f} {unit} ({expected / max(measured, 1e-9):.2f}x)"
            for name, expected, measured, unit in pairs
        )
