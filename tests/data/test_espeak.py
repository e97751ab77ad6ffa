"""Utterances of a program that stands in for espeak-ng."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from layerwright.core.errors import LayerwrightError
from layerwright.data.espeak import EspeakVoice, MissingProgramError, espeak_corpus, espeak_phonemes

# As the program itself does: the header is written before the length is known, silence stands at both ends.
FAKE = """#!{python}
import math, os, struct, sys
with open(os.path.join(os.path.dirname(sys.argv[0]), "calls"), "a") as calls:
    calls.write("|".join(sys.argv[1:]) + chr(10))
if sys.argv[1] == "--version":
    print("eSpeak NG text-to-speech: {version}  Data at: /somewhere")
    sys.exit()
assert sys.argv[-2] == "--", sys.argv
if "--ipa" in sys.argv:
    print(" " + sys.argv[-1].upper())
    sys.exit()
arguments = dict(zip(sys.argv[1:7:2], sys.argv[2:7:2]))
assert sys.argv[7] == "--stdout" and 80 <= int(arguments["-s"]) <= 450 and 0 <= int(arguments["-p"]) <= 99, sys.argv
if arguments["-v"] == "nobody":
    print("Error: The specified espeak-ng voice does not exist.", file=sys.stderr)
    sys.exit(1)
hertz = 300 if "+m" in arguments["-v"] else 600
tone = [int(8000 * math.sin(2 * math.pi * hertz * i / 22050)) for i in range(22050 * len(sys.argv[-1]) // 20)]
samples = [0] * 2205 + tone + [0] * 4410
head = b"RIFF" + struct.pack("<I", 0x7FFFF024) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 22050, 44100, 2, 16)
sys.stdout.buffer.write(head + b"data" + struct.pack("<I", 0x7FFFF000) + struct.pack("<%dh" % len(samples), *samples))
"""


def program(folder: Path, text: str = FAKE, version: str = "1.51") -> str:
    path = folder / "espeak-ng"
    path.write_text(text.format(python=sys.executable, version=version) if text == FAKE else text)
    path.chmod(0o755)
    return str(path)


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


def test_utterances(tmp_path: Path) -> None:
    path = program(tmp_path)
    said = espeak_corpus(["a red house", "-v sun"], ["en-us+f3", EspeakVoice("en-us+m1", 30, 200)], program=path)
    assert [(one.voice, one.text) for one in said] == [
        ("en-us+f3", "a red house"),
        ("en-us+f3", "-v sun"),
        ("en-us+m1", "a red house"),
        ("en-us+m1", "-v sun"),
    ]
    for one in said:
        assert one.rate == 16_000 and one.samples.dtype == torch.float32
        assert one.seconds == pytest.approx(len(one.text) / 20, abs=0.035)  # the silence is gone
        peak = int(torch.fft.rfft(one.samples).abs().argmax()) * 16_000 / len(one.samples)
        assert peak == pytest.approx(300 if "+m" in one.voice else 600, abs=4)  # the pitch has not changed
        assert float(one.samples.abs().max()) == pytest.approx(8000 / 32768, rel=0.03)
    assert "-v|en-us+m1|-p|30|-s|200|--stdout|--|a red house" in (tmp_path / "calls").read_text().splitlines()
    same = espeak_corpus(["a red house"], ["en-us+f3"], 22_050, program=path)[0]
    assert same.rate == 22_050 and len(same.samples) == pytest.approx(22_050 * 11 / 20, abs=450)


def test_cache(tmp_path: Path) -> None:
    path, cache = program(tmp_path), tmp_path / "said" / "before"
    first = espeak_corpus(["sun", "moon"], ["en-us+f3"], program=path, cache=cache)
    assert calls(tmp_path) == 3  # one for the version
    again = espeak_corpus(["sun", "moon", "star"], ["en-us+f3"], program=path, cache=cache)
    assert calls(tmp_path) == 5
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(first, again, strict=False))
    assert len(list(cache.iterdir())) == 3 and all(one.suffix == ".safetensors" for one in cache.iterdir())
    espeak_corpus(["sun"], [EspeakVoice("en-us+f3", 51)], program=path, cache=cache)
    espeak_corpus(["sun"], ["en-us+f3"], 8000, program=path, cache=cache)
    program(tmp_path, version="1.52")  # another program's speech is another's
    espeak_corpus(["sun"], ["en-us+f3"], program=path, cache=cache)
    assert calls(tmp_path) == 11


def test_phonemes(tmp_path: Path) -> None:
    assert espeak_phonemes(["sun", "-q"], program=program(tmp_path)) == ["SUN", "-Q"]


def test_programs_that_fail(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Debian package espeak-ng") as found:
        espeak_corpus(["sun"], ["en-us"], program=str(tmp_path / "nothing"))
    assert isinstance(found.value, MissingProgramError) and isinstance(found.value, LayerwrightError)
    with pytest.raises(ValueError, match=r"failed with code 1: Error: The specified espeak-ng voice"):
        espeak_corpus(["sun"], ["nobody"], program=program(tmp_path))
    with pytest.raises(ValueError, match="no sound that can be read"):
        espeak_corpus(["sun"], ["en-us"], program=program(tmp_path, "#!/bin/sh\nexit 0\n"))


def test_bad_input(tmp_path: Path) -> None:
    path = program(tmp_path)
    for sentences, voices in (([], ["en-us"]), (["sun"], []), (["sun", "  "], ["en-us"])):
        with pytest.raises(ValueError, match="sentences and"):
            espeak_corpus(sentences, voices, program=path)
    with pytest.raises(ValueError, match="rate: got 0"):
        espeak_corpus(["sun"], ["en-us"], 0, program=path)
    for bad in ({"name": ""}, {"name": "en", "pitch": 100}, {"name": "en", "speed": 20}):
        with pytest.raises(ValueError, match="voice: got name"):
            EspeakVoice(**bad)  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak_itself() -> None:
    low, high = espeak_corpus(["red house"], ["en-us+m3", "en-us+f3"])
    assert 0.3 < low.seconds < 2 and not torch.equal(low.samples, high.samples)
    assert "haʊs" in espeak_phonemes(["red house"])[0].replace("ˈ", "")
