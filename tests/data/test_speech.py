"""Generated speech, and digits by a program that stands in for espeak-ng."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwright.data.speech import espeak_digits, generated_speech, log_mel, small_speech

FAKE = """#!{python}
import struct, sys, wave, math
arguments = dict(zip(sys.argv[1:-1:2], sys.argv[2:-1:2]))
digits = sys.argv[-1].split()
assert all(len(d) == 1 and d.isdigit() for d in digits) and 1 <= len(digits) <= 9, sys.argv
assert 80 <= int(arguments["-s"]) <= 450 and 0 <= int(arguments["-p"]) <= 99 and arguments["-v"] in ("en-us", "en-gb")
rate, frames = 16000, b""
for digit in digits:
    for i in range(1600):
        frames += struct.pack("<h", int(8000 * math.sin(2 * math.pi * (200 + 300 * int(digit)) * i / rate)))
with wave.open(arguments["-w"], "wb") as file:
    file.setnchannels(1); file.setsampwidth(2); file.setframerate(rate); file.writeframes(frames)
"""


def program(folder: Path, text: str) -> str:
    path = folder / "espeak-ng"
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_generated_speech() -> None:
    speech = generated_speech(200, 5)
    assert len(speech) == 200 and speech.channels == 12 and speech.symbols == 9 and speech.source == "generated"
    assert {len(own) for own in speech.labels} == {3, 4, 5, 6, 7}
    assert {symbol for own in speech.labels for symbol in own} == set(range(1, 9))
    for frames, own in zip(speech.features, speech.labels, strict=True):
        assert 2 * len(own) <= len(frames) <= 5 * len(own)
        assert frames.shape[1] == 12 and bool(frames.isfinite().all())
    again, other = generated_speech(200, 5), generated_speech(200, 6)
    assert all(torch.equal(a, b) for a, b in zip(speech.features, again.features, strict=True))
    assert speech.labels == again.labels != other.labels


def test_symbols_sound_alike_within_and_unlike_between() -> None:
    """With one symbol of fixed length, no speaker effects left after averaging, patterns differ."""
    speech = generated_speech(600, 0, symbols=4, lengths=(1, 1), durations=(3, 3), noise=0.1)
    means = []
    for symbol in range(1, 5):
        own = [f for f, s in zip(speech.features, speech.labels, strict=True) if s == (symbol,)]
        means.append(torch.stack(own).mean(0))
        assert float((torch.stack(own) - means[-1]).square().mean()) < 0.2
    gaps = [float((a - b).square().mean()) for i, a in enumerate(means) for b in means[:i]]
    assert min(gaps) > 0.02
    # And the patterns are those of every other set.
    other = generated_speech(600, 9, symbols=4, lengths=(1, 1), durations=(3, 3), noise=0.1)
    again = torch.stack([f for f, s in zip(other.features, other.labels, strict=True) if s == (1,)]).mean(0)
    assert torch.allclose(again, means[0], atol=0.15)


def test_batches() -> None:
    speech = generated_speech(10, 1)
    whole = list(speech.batches(4))
    assert [len(batch["targets"]) for batch in whole] == [4, 4, 2]
    first = whole[0]
    for row in range(4):
        frames, labels = int(first["feature_lengths"][row]), int(first["target_lengths"][row])
        assert torch.equal(first["features"][row, :frames], speech.features[row])
        assert not first["features"][row, frames:].any()
        assert tuple(first["targets"][row, :labels].tolist()) == speech.labels[row]
    mixed = [b["targets"] for b in speech.batches(10, torch.Generator().manual_seed(0))]
    assert not torch.equal(mixed[0], next(speech.batches(10))["targets"])
    assert torch.equal(mixed[0].sort(0).values, next(speech.batches(10))["targets"].sort(0).values)
    with pytest.raises(ValueError, match="batch_size"):
        next(speech.batches(0))


@pytest.mark.parametrize(
    "options",
    [
        {"count": 0},
        {"symbols": 1},
        {"channels": 3},
        {"noise": -1.0},
        {"lengths": (0, 3)},
        {"lengths": (4, 3)},
        {"durations": (3, 2)},
    ],
)
def test_bad_input(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        generated_speech(**({"count": 2} | options))


def test_digits_of_a_program(tmp_path: Path) -> None:
    path = program(tmp_path, FAKE)
    speech = espeak_digits(5, 3, program=path)
    assert speech.symbols == 11 and speech.source == "espeak-ng" and speech.channels == 12
    for frames, own in zip(speech.features, speech.labels, strict=True):
        assert 3 <= len(own) <= 7 and all(1 <= symbol <= 10 for symbol in own)
        assert len(frames) == (1600 * len(own) - 512) // 160 + 1
    # A digit's tone is in the band where it belongs: higher digits, higher bands.
    first = speech.features[0]
    bands = [int(first[10 * k + 4].argmax()) for k in range(len(speech.labels[0]))]
    said = sorted(zip(speech.labels[0], bands, strict=True))
    assert [band for _, band in said] == sorted(bands) and len(set(bands)) > 1
    again = espeak_digits(5, 3, program=path)
    assert again.labels == speech.labels
    assert all(torch.equal(a, b) for a, b in zip(again.features, speech.features, strict=True))


def test_programs_that_fail(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="generated_speech"):
        espeak_digits(1, program=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="failed with code 3: no such voice"):
        espeak_digits(1, program=program(tmp_path, "#!/bin/sh\necho no such voice >&2\nexit 3\n"))
    with pytest.raises(ValueError, match="count"):
        espeak_digits(0, program=str(tmp_path / "nothing"))


def test_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert small_speech(3, 1).source == "generated"
    with pytest.raises(FileNotFoundError):
        small_speech(3, 1, "espeak")
    with pytest.raises(ValueError, match="source"):
        small_speech(3, 1, "festival")  # type: ignore[arg-type]
    program(tmp_path, FAKE)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert small_speech(2, 1).source == "espeak-ng"
    assert small_speech(2, 1, "generated").source == "generated"


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak_itself() -> None:
    speech = espeak_digits(3, 0)
    assert all(len(frames) > 20 * len(own) for frames, own in zip(speech.features, speech.labels, strict=True))


def test_log_mel() -> None:
    time = torch.arange(8000) / 16000
    low, high = (log_mel(torch.sin(2 * torch.pi * f * time), 16000) for f in (150.0, 5000.0))
    assert low.shape == high.shape == ((8000 - 512) // 160 + 1, 12)
    assert low.mean(0).argmax() < 2 and high.mean(0).argmax() > 8
    assert float(low.mean()) == pytest.approx(0, abs=1e-4) and float(low.std()) == pytest.approx(1, abs=1e-3)
    assert bool(log_mel(torch.zeros(1000), 16000).isfinite().all())
    with pytest.raises(ValueError, match="samples"):
        log_mel(torch.zeros(100), 16000)
