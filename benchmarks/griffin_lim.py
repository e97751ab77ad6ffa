"""Mel spectra and Griffin-Lim beside librosa: time, and how near the result is.

    python -m benchmarks.griffin_lim [--peer PYTHON] [--seconds 1 4] [--iterations 60] [--rounds 7] [--json]

``--peer`` is the interpreter of an environment that has librosa. Both are given the same samples of generated speech at
22,050 Hz, with Tacotron 2's settings (window 1024, hop 256, 80 bands to 8 kHz), and the same momentum, 0.99. Each lives in
a process of its own with one thread, and they take turns; times are those of the processor, which other programs disturb
less than the wall's. A ratio compares two times of one round, and the median over rounds is printed. `convergence` is the distance of the result's magnitudes from those asked for, measured by us for
both. Phases at the start are random, each one's own. Without ``--peer`` ours is timed alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

OURS, PEER = "ours", "librosa"
TASKS = ("mel", "griffin-lim")
RATE, WINDOW, HOP, BINS, HIGH = 22_050, 1024, 256, 80, 8000.0
Calls = dict[str, Callable[[], "np.ndarray[Any, Any]"]]


def ours(samples: np.ndarray[Any, Any], iterations: int) -> Calls:
    """Our calls."""
    import torch

    from layerwright.data.mel import MelSettings, griffin_lim, magnitude_spectrogram, mel_spectrogram

    torch.set_num_threads(1)
    settings, sound = MelSettings(), torch.from_numpy(samples)
    magnitude = magnitude_spectrogram(sound, settings)
    return {
        "mel": lambda: mel_spectrogram(sound, settings).numpy(),
        "griffin-lim": lambda: griffin_lim(magnitude, settings, iterations=iterations).numpy(),
    }


def theirs(samples: np.ndarray[Any, Any], iterations: int) -> Calls:
    """The same by librosa."""
    import librosa

    settings: dict[str, Any] = {"n_fft": WINDOW, "hop_length": HOP, "pad_mode": "reflect"}
    magnitude = np.abs(librosa.stft(samples, **settings))
    filters = librosa.filters.mel(sr=RATE, n_fft=WINDOW, n_mels=BINS, fmin=0.0, fmax=HIGH)

    def mel() -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = np.log(np.maximum(filters @ np.abs(librosa.stft(samples, **settings)), 1e-5)).T
        return found

    def sound() -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = librosa.griffinlim(
            magnitude, n_iter=iterations, momentum=0.99, random_state=0, **settings
        )
        return found

    return {"mel": mel, "griffin-lim": sound}


def serve(kind: str, folder: str, iterations: int) -> None:
    """Answer each line of standard input, a task, with seconds, and leave the result in a file."""
    calls = (ours if kind == OURS else theirs)(np.load(Path(folder) / "samples.npy"), iterations)
    for line in sys.stdin:
        begun = time.process_time()
        found = calls[line.strip()]()
        seconds = time.process_time() - begun
        np.save(Path(folder) / f"{kind}.npy", found)
        print(json.dumps(seconds), flush=True)


class Worker:
    """One of the two in a process of its own."""

    def __init__(self, kind: str, interpreter: str, folder: str, iterations: int) -> None:
        words = [interpreter, __file__, "--serve", kind, "--folder", folder, "--iterations", str(iterations)]
        self.kind, self.folder = kind, Path(folder)
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, task: str) -> float:
        """Seconds."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of {self.kind} ended: see its message above")
        return float(json.loads(answer))

    def result(self) -> np.ndarray[Any, Any]:
        """What the last task gave."""
        found: np.ndarray[Any, Any] = np.load(self.folder / f"{self.kind}.npy")
        return found

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def compare(seconds: float, a: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for speech of one length."""
    import torch
    from scipy.signal import resample_poly

    from layerwright.data.mel import MelSettings, magnitude_spectrogram, spectral_convergence
    from layerwright.data.source_filter import SourceFilterVoice, source_filter_corpus

    text = "red lamp wind over the soft sand " * (1 + int(seconds))
    said = source_filter_corpus([text], [SourceFilterVoice("voice", 160.0)])[0]
    samples = resample_poly(said.samples.numpy(), 441, 320)[: int(seconds * RATE) // HOP * HOP].astype(np.float32)
    sound = torch.from_numpy(samples)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "samples.npy", samples)
        workers = {OURS: Worker(OURS, sys.executable, folder, a.iterations)}
        if a.peer:
            workers[PEER] = Worker(PEER, a.peer, folder, a.iterations)
        for task in TASKS:
            rounds = [{name: worker.ask(task) for name, worker in workers.items()} for _ in range(a.rounds + 1)][1:]
            results = {name: torch.from_numpy(worker.result()) for name, worker in workers.items()}
            for name in workers:
                row: dict[str, Any] = {"seconds": seconds, "task": task, "by": name}
                row["ms"] = 1e3 * statistics.median(times[name] for times in rounds)
                ratios = [times[name] / times[OURS] for times in rounds]
                row |= {"ours is faster by": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
                if task == "mel":
                    row["differs by"] = float((results[name] - results[OURS]).abs().max())
                else:
                    wanted = magnitude_spectrogram(sound, MelSettings())
                    row["convergence, dB"] = spectral_convergence(results[name], wanted, MelSettings())
                rows.append(row)
        for worker in workers.values():
            worker.close()
    return rows


def main() -> None:
    """Time and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", help="python of an environment with librosa")
    parser.add_argument("--seconds", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=[OURS, PEER], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        serve(a.serve, a.folder, a.iterations)
        return
    rows = [row for seconds in a.seconds for row in compare(seconds, a)]
    if a.json:
        print(json.dumps(rows))
        return
    print(f"{'seconds':>7} {'task':12} {'by':8} {'ms':>8} {'ours faster':>11}  {'range':13} nearness")
    for row in rows:
        near = f"differs by {row['differs by']:.1e}" if "differs by" in row else f"{row['convergence, dB']:.1f} dB"
        span = f"{row['lowest']:.2f}..{row['highest']:.2f}"
        print(
            f"{row['seconds']:7g} {row['task']:12} {row['by']:8} {row['ms']:8.1f} {row['ours is faster by']:10.2f}x  "
            f"{span:13} {near}"
        )


if __name__ == "__main__":
    main()
