"""Speech of many voices by the program espeak-ng: utterances with their text."""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwright.core.errors import InputError, LayerwrightError
from layerwright.data.spoken import Utterance, trim_silence

__all__ = ["EspeakVoice", "MissingProgramError", "espeak_corpus", "espeak_phonemes", "find_espeak"]

PROGRAM = "espeak-ng"
_TIMEOUT_S = 30


class MissingProgramError(LayerwrightError, RuntimeError):
    """A program is needed and not installed."""


@dataclass(frozen=True)
class EspeakVoice:
    """A voice of the program.

    Attributes:
        name: a language and a variant, such as ``en-us+f3``; variants are m1 to m8, f1 to f5, croak, whisper, ...
        pitch: 0 to 99.
        speed: words per minute, 80 to 450.

    Raises:
        InputError: a number outside its range, or an empty name.
    """

    name: str
    pitch: int = 50
    speed: int = 175

    def __post_init__(self) -> None:
        if not self.name or not 0 <= self.pitch <= 99 or not 80 <= self.speed <= 450:
            raise InputError(
                f"voice: got name={self.name!r}, pitch={self.pitch}, speed={self.speed}; "
                "expected a name, 0 to 99 and 80 to 450"
            )


def find_espeak(program: str | None = None) -> str:
    """The path of espeak-ng, or of `program`.

    Raises:
        MissingProgramError: it is not installed.
    """
    found = shutil.which(program or PROGRAM)
    if found is None:
        raise MissingProgramError(
            f"{program or PROGRAM} is not installed: install the Debian package espeak-ng (apt-get install espeak-ng), "
            "or use source_filter_corpus"
        )
    return found


def espeak_corpus(
    sentences: Sequence[str],
    voices: Sequence[str | EspeakVoice],
    rate: int = 16_000,
    *,
    program: str | None = None,
    below_db: float = 40.0,
    cache: str | Path | None = None,
) -> list[Utterance]:
    """What each voice says of each sentence, voice after voice, resampled and without silence at its ends.

    Runs the program once for each utterance that the cache does not hold, a few at a time.

    Args:
        sentences: what is said.
        voices: names or `EspeakVoice`.
        rate: samples per second of the result; the program has 22,050.
        program: path or name of espeak-ng.
        below_db: see `trim_silence`.
        cache: a folder for what was said, by a hash of everything that it depends on; none is kept if left out.

    Raises:
        MissingProgramError: the program is not installed.
        InputError: no sentences, an empty one, no voices, a rate below 1, or the program failed.
    """
    if not sentences or not voices or any(not sentence.strip() for sentence in sentences):
        raise InputError(
            f"got {len(sentences)} sentences and {len(voices)} voices, expected at least one of each, none of them empty"
        )
    if rate < 1:
        raise InputError(f"rate: got {rate}, expected at least 1 sample per second")
    found = find_espeak(program)
    known = [voice if isinstance(voice, EspeakVoice) else EspeakVoice(voice) for voice in voices]
    folder = None if cache is None else Path(cache)
    # What the program is, so that another version's speech is not taken for its own.
    version = "" if folder is None else _run([found, "--version"]).decode(errors="replace").split("Data at")[0]

    def said(job: tuple[EspeakVoice, str]) -> Utterance:
        voice, sentence = job
        command = [found, "-v", voice.name, "-p", str(voice.pitch), "-s", str(voice.speed), "--stdout", "--", sentence]
        if folder is None:
            return Utterance(_resampled(command, rate, below_db), rate, sentence, voice.name)
        key = repr((version, command[1:], rate, below_db))
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if path.is_file():
            return Utterance(load_file(path)["samples"], rate, sentence, voice.name)
        samples = _resampled(command, rate, below_db)
        _store(samples, path)
        return Utterance(samples, rate, sentence, voice.name)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(said, [(voice, sentence) for voice in known for sentence in sentences]))


def espeak_phonemes(sentences: Sequence[str], voice: str = "en-us", *, program: str | None = None) -> list[str]:
    """The phonemes that the program would say, in the International Phonetic Alphabet, stress marks included.

    Raises:
        MissingProgramError: the program is not installed.
        InputError: the program failed.
    """
    found = find_espeak(program)
    return [
        " ".join(_run([found, "-q", "--ipa", "-v", voice, "--", sentence]).decode().split()) for sentence in sentences
    ]


def _run(command: Sequence[str]) -> bytes:
    try:
        done = subprocess.run(list(command), capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{command[0]}: no answer within {_TIMEOUT_S} s") from error
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())[:160]
        raise InputError(f"{command[0]} failed with code {done.returncode}: {reason}")
    return done.stdout


def _resampled(command: Sequence[str], rate: int, below_db: float) -> Tensor:
    """What the command writes to its output, at `rate`, from -1 to 1."""
    from scipy.signal import resample_poly

    try:
        # The length in the header is wrong, as the program writes it before it speaks; what is there is read.
        with wave.open(io.BytesIO(_run(command))) as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise InputError(f"{command[0]}: wrote no sound that can be read ({error}); is the voice installed?") from error
    if width != 2 or channels != 1:
        raise InputError(f"{command[0]}: got {channels} channels of {width} bytes, expected 1 of 2")
    samples = np.frombuffer(raw[: len(raw) // 2 * 2], dtype="<i2").astype(np.float64) / 32768
    if own != rate:
        common = math.gcd(own, rate)
        samples = resample_poly(samples, rate // common, own // common)
    return trim_silence(torch.from_numpy(samples).float().clamp(-1, 1), rate, below_db).clone()


def _store(samples: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file({"samples": samples.contiguous()}, name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
