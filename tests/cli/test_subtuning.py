"""`layerwright tune --method subtuning`: from a folder of labelled images to a classifier of other classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layerwright.cli import main
from layerwright.cli.settings import read_settings
from layerwright.core.errors import InputError
from layerwright.data.demo_data import digits
from layerwright.data.loading import load

PIL = pytest.importorskip("PIL.Image")
BLOCKS = "blocks=[vit.layers.2, vit.layers.6, vit.layers.7]"
SMALL = ["--steps", "8", "--set", "folds=2", "--set", "max_blocks=1", "--set", BLOCKS]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of each of three digits, by name."""
    folder = tmp_path_factory.mktemp("pictures")
    images, labels = digits("train")
    for label, name in ((1, "one"), (4, "four"), (7, "seven")):
        (folder / name).mkdir()
        for number, image in enumerate(images[labels == label][:8]):
            PIL.fromarray(((image[0] + 1) * 127.5).to(torch.uint8).numpy()).save(folder / name / f"{number}.png")
    return folder


def test_a_folder_of_images_becomes_a_classifier(pictures: Path, tmp_path: Path, said: Callable[..., str]) -> None:
    out = tmp_path / "out"
    text = said("tune", "demo:vit", "--method", "subtuning", "--data", pictures, "-o", out, *SMALL)
    assert "vit.layers.6" in text and "chosen: " in text and "the readout alone" in text
    model, _ = load(out)
    assert model.config.id2label == {0: "four", 1: "one", 2: "seven"}
    record = json.loads((out / "subtuning.json").read_text())
    assert [row["blocks"] for row in record["profile"]] == [["vit.layers.2"], ["vit.layers.6"], ["vit.layers.7"]]
    assert len(record["trace"]) == 1 and len(record["blocks"]) <= 1
    assert not list(tmp_path.glob("*.json")), "the record moved into the folder"
    before, _ = load("demo:vit", dtype="float32")
    known = dict(before.state_dict())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, known[name])}
    assert all(name.startswith((*(f"{block}." for block in record["blocks"]), "classifier.")) for name in changed)


def test_its_own_data_and_json(tmp_path: Path, said: Callable[..., str]) -> None:
    text = said("tune", "demo:vit", "-m", "subtuning", "-o", tmp_path / "out", "--samples", "100", "--json", *SMALL)
    measured = json.loads(text)
    assert list(measured) == ["before", "after", "checkpoint"], "the same classes can be compared"
    assert measured["after"]["accuracy"] > 0.5


def test_a_killed_run_goes_on(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = tmp_path / "out.subtuning.json"
    arguments = ["tune", "demo:vit", "--method", "subtuning", "--data", str(pictures), "-o", str(out), *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", "from layerwright.cli import main; main()", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    while not record.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not out.exists()
    known = json.loads(record.read_text())["evaluations"]
    known[0]["runs"] = [0.987654, 0.987654]  # what is known is not evaluated again
    record.write_text(json.dumps(json.loads(record.read_text()) | {"evaluations": known}))
    assert main([*arguments, "--seed", "1"]) == 2, "another seed is another search"
    assert main(arguments) == 0
    rows = {
        tuple(row["blocks"]): row["runs"] for row in json.loads((out / "subtuning.json").read_text())["evaluations"]
    }
    assert rows[tuple(known[0]["blocks"])] == [0.987654, 0.987654] and len(rows) == 4
    assert not record.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "folds=9"], "folds: got 9, and class"),
        (["--set", "eps=-1"], "eps: got -1"),
        (["--set", "max_blocks=0"], "max_blocks: got 0"),
        (["--set", "blocks=[vit.layers.2, vit.layers.2.mlp]"], "overlap"),
        (["--set", "epss=1"], "subtuning takes no setting 'epss'"),
        (["--set", "eps"], "expected name=value"),
    ],
)
def test_bad_settings_end_in_one_line(
    pictures: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "demo:vit", "-m", "subtuning", "--data", str(pictures), "-o", str(tmp_path / "out"), *arguments]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_bad_data_ends_in_one_line(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "only").mkdir(parents=True)
    out = ["-o", str(tmp_path / "out")]
    assert main(["tune", "demo:vit", "-m", "subtuning", "--data", str(tmp_path / "data"), *out]) == 2
    assert "no images" in capsys.readouterr().err
    assert main(["tune", str(tiny), "-m", "subtuning", "--samples", "8", "--length", "16", *out]) == 2
    assert "one class for each sample" in capsys.readouterr().err


def test_a_text_classifier_learns_from_labelled_lines(tmp_path: Path, said: Callable[..., str]) -> None:
    import transformers

    from layerwright.data.demo.train_lm import byte_tokenizer

    folder = tmp_path / "model"
    config = transformers.BertConfig(
        vocab_size=272,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    lines = [{"text": f"{label} {number}" * (1 + number % 2), "label": label} for label in "abc" for number in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    said("tune", folder, "-m", "subtuning", "--data", data, "-o", out, "--steps", "3", "--set", "folds=2")
    assert load(out)[0].config.id2label == {0: "a", 1: "b", 2: "c"}


def test_settings_are_read() -> None:
    found = read_settings(["a=1", "b-c=[x, 2]", "d=0.5", "e=true", "f=word", "g="])
    assert found == {"a": 1, "b_c": ["x", 2], "d": 0.5, "e": True, "f": "word", "g": None}
    for wrong in (["a"], ["=1"], ["a=1", "a=2"], ["a=[1"]):
        with pytest.raises(InputError, match="--set"):
            read_settings(wrong)
