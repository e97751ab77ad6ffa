"""Whatever is wrong with what was given: exit code 2, one line a problem, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.torch import load_file, save_file

from layerwright.cli import main

SMALL = ["--samples", "4", "--length", "32"]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


@pytest.fixture
def complains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., list[str]]:
    """Run a command that must fail; returns its lines, after looking for anything left behind."""

    def run(*arguments: str | Path) -> list[str]:
        before = sorted(tmp_path.rglob("*"))
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if not re.match(r"^[\w. :,/]+: \d+/\d+$", line)]
        assert code == 2, captured
        assert lines and all(line.startswith("layerwright: ") for line in lines), captured.err
        assert "Traceback" not in captured.err
        assert sorted(tmp_path.rglob("*")) == before
        return [line.removeprefix("layerwright: ") for line in lines]

    return run


Complains = Callable[..., list[str]]


def plan_text(**layers: str) -> str:
    return "layerwright_plan: 1\nlayers:\n" + "".join(f"  {path}: {value}\n" for path, value in layers.items())


# -- checkpoints ------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def scribble(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"{{{{" + data[12:])


def unshape(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[272,32]', b'"shape":[272,99]', 1))


def point_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    index = {"weight_map": {"lm_head.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def poison(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state[f"{UP}.weight"][3, 5] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def lose(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state[f"{UP}.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json: expected a model folder"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "truncated": (cut, r"truncated or corrupted: its header promises [\d,]+ bytes, the file has"),
    "corrupted header": (scribble, "has a corrupted header"),
    "wrong shape": (unshape, r"corrupted header .*has \d+ bytes for the shape \[272, 99\]"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), r"is truncated \(0 bytes\)"),
    "index points outside": (point_outside, r"points outside its folder \('../secret.safetensors'\): refused"),
    "pickle only": (
        pickle_only,
        r"only pickled weights \(pytorch_model.bin\).* convert them once with .*save_pretrained",
    ),
    "NaN": (poison, f"the weight {UP}.weight holds NaN or infinite values"),
    "a tensor is missing": (lose, f"lacks 1 tensor of LlamaForCausalLM: {UP}.weight"),
    "unknown architecture": (lambda f: configure(f, model_type="nonsense"), "expected an architecture of transformers"),
    "its own code": (
        lambda f: configure(f, model_type="nonsense", auto_map={"AutoConfig": "evil.Config"}),
        "config.json cannot be used",
    ),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer or processor cannot be read"),
    "tokenizer of another model": (lambda f: configure(f, vocab_size=96), "its vocabulary ends at 95"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint(name: str, broken: Path, complains: Complains) -> None:
    damage, message = DAMAGES[name]
    damage(broken)
    lines = complains("plan", broken, "-b", "bits=4", "-o", broken.parent / "plan.yaml", *SMALL)
    assert len(lines) == 1
    assert str(broken) in lines[0]
    assert re.search(message, lines[0]), lines


@pytest.mark.parametrize("how", ["block by block", "whole"])
def test_apply_finds_nan_before_it_writes(how: str, broken: Path, complains: Complains) -> None:
    poison(broken)
    plan = broken.parent / "plan.yaml"
    plan.write_text(plan_text(**{"model.layers.0.mlp.up_proj": "{quantize: {bits: 4}}"}))
    (line,) = complains("apply", broken, plan, "-o", broken.parent / "out", *["--whole"] * (how == "whole"), *SMALL)
    assert f"{UP}.weight holds NaN" in line


def test_a_path_that_is_not_there(complains: Complains, tmp_path: Path) -> None:
    (line,) = complains("inspect", tmp_path / "nowhere")
    assert line.startswith(f"no model at {tmp_path / 'nowhere'}: give a folder in the Hugging Face layout")
    (line,) = complains("inspect", "demo:ln")
    assert "did you mean demo:lm" in line
    (line,) = complains("report", tmp_path)
    assert "report.json does not exist: run `layerwright optimize" in line


# -- names ------------------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_together(tiny: Path, complains: Complains, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    options = ["--recipe", "mixd", "--target", "vlm", "--dtype", "float12", "--device", "cuda:7", "--budget", "bits=x"]
    lines = complains("optimize", tiny, *options, "-o", tmp_path / "photos", "--data", tmp_path / "gone.txt")
    text = "\n".join(lines)
    assert len(lines) == 7
    assert re.search("unknown recipe 'mixd'; did you mean .*mixed", text)
    assert "unknown target 'vlm'; did you mean vllm?" in text
    assert "unknown dtype 'float12'; did you mean float32, float16, bfloat16?" in text
    assert re.search(r"device: 'cuda:7' is not there \(.+\); use cpu", text)
    assert "'bits=x' is not a positive number" in text
    assert "photos already holds something else (cat.jpg): give another folder" in text
    assert f"no text file at {tmp_path / 'gone.txt'}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{tiny}", "--scores", "fischer", *SMALL], "unknown scorer 'fischer'; did you mean fisher"),
        (["tune", "{tiny}", "--method", "lorra", "-o", "{out}", *SMALL], "unknown tuner 'lorra'; did you mean lora"),
        (["tune", "{tiny}", "--method", "distill", "-o", "{out}", *SMALL], "needs the original model: pass --teacher"),
        (["export", "{tiny}", "--format", "gguff", "-o", "{out}"], "'gguff'.*gguf"),
        (["study", "adaquan"], "did you mean adaquant"),
        (["inspekt"], "No such command 'inspekt'.*inspect.*; see `layerwright --help`"),
        (["check", "{tiny}"], "Missing option '--budget'.*; see `layerwright check --help`"),
        (["check", "{tiny}", "-b", "bits=4", "--sampels", "4"], "No such option: --sampels.*--samples"),
        (["check", "{tiny}", "-b", "bits=4", "--samples", "0"], "0 is not in the range|greater than or equal to 1"),
        (["check", "{tiny}", "-b", "bits=4", "--device", "meta"], "device: 'meta' is not there"),
        (["measure", "{tiny}", "--device", "gpu"], "device: 'gpu' is not there"),
    ],
)
def test_unknown_names(arguments: list[str], message: str, tiny: Path, tmp_path: Path, complains: Complains) -> None:
    (line,) = complains(*(a.format(tiny=tiny, out=tmp_path / "out") for a in arguments))
    assert re.search(message, line), line


def test_a_recipe_file_with_unknown_parts(tiny: Path, tmp_path: Path, complains: Complains) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("{name: own, scorer: fischer, allocator: integre, candidates: [{quantize: {bits: 4}}]}")
    lines = complains("check", tiny, "-b", "bits=4", "-r", file, *SMALL)
    assert [line.split(";")[0] for line in lines] == ["unknown scorer 'fischer'", "unknown allocator 'integre'"]
    file.write_text("{name: own, candidates: [{quantise: {bits: 4}}]}")
    (line,) = complains("check", tiny, "-b", "bits=4", "-r", file, *SMALL)
    assert "quantise" in line and "quantize" in line and str(file) in line


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("", "expected one like bits=4.25"),
        ("4.25", "has no '='"),
        ("bits=four", "is not a positive number"),
        ("bits=-3", "is not a positive number"),
        ("size=0x", "must be above zero"),
        ("byts=3", "unknown budget 'byts'; did you mean bits"),
        ("size=0.5", "looks relative; write size=0.5x"),
        ("bits=3,size=0.5x", "limits bytes twice"),
        ("bits=99", "outside 1..32"),
        ("bits=1", r"cannot be reached with recipe rtn; the reachable minimum is bits=\d"),
        ("size=0.01x", r"cannot be reached with recipe rtn; the reachable minimum is size=0\.\d+x \(0\.\d+ MB\)"),
    ],
)
def test_budgets(budget: str, message: str, tiny: Path, complains: Complains) -> None:
    (line,) = complains("check", tiny, "-b", budget, "-r", "rtn", *SMALL)
    assert re.search(message, line), line


def test_the_reachable_minimum_is_reachable(tiny: Path, complains: Complains) -> None:
    for budget in ("bits=1", "size=0.01x"):
        (line,) = complains("check", tiny, "-b", budget, "-r", "mixed", *SMALL)
        name, least = re.findall(r"minimum is (bits|size)=([\d.]+)", line)[0]
        unit = "x" if name == "size" else ""
        assert main(["check", str(tiny), "-b", f"{name}={float(least) + 0.01:.3f}{unit}", "-r", "mixed", *SMALL]) == 0


def test_a_budget_that_dropping_blocks_cannot_reach_either(tiny: Path, tmp_path: Path, complains: Complains) -> None:
    (line,) = complains("plan", tiny, "-b", "size=0.01x", "-o", tmp_path / "plan.yaml", *SMALL)
    assert re.search(r"the reachable minimum is size=0\.\d+x \(0\.\d+ MB\)", line), line


# -- plans ------------------------------------------------------------------------------------------------------------

Q4 = "{quantize: {bits: 4}}"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (plan_text(**{"model.layers.1.mlp.up_prj": Q4}), 3, f"unknown layer.*did you mean .*{UP}"),
        (plan_text(**{UP: "{quantise: {bits: 4}}"}), 3, "quantise.*quantize"),
        (plan_text(**{UP: Q4}) + f"  {UP}: {Q4}\n", 4, r"is given twice \(first in line 3\)"),
        (plan_text(**{UP: "{keep: {}, quantize: {bits: 4}}"}), 3, "keep stands alone; it contradicts"),
        (plan_text(**{UP: "{quantize: {bits: 4, group_size: 24}}"}), 3, "group_size.*24"),
        (plan_text(**{UP: "{quantize: {bits: 40}}"}), 3, "bits.*40"),
        (plan_text(**{"model.layers.1": "{drop: {}}", UP: Q4}), 4, "but model.layers.1 is dropped"),
        (plan_text(**{"model.layers.1": Q4}), 3, "has no weight of its own; name its layers"),
        ("layers: [", 1, "not valid YAML"),
        ("", 1, "the file is empty"),
    ],
)
def test_plans(text: str, line: int, message: str, tiny: Path, tmp_path: Path, complains: Complains) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    (said,) = complains("apply", tiny, plan, "-o", tmp_path / "out", *SMALL)
    assert said.startswith(f"{plan}:{line}: ") or "not valid YAML" in said, said
    assert re.search(message, said), said


def test_each_mistake_in_a_plan_has_a_line_of_its_own(tiny: Path, tmp_path: Path, complains: Complains) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(plan_text(**{UP: "{quantise: {}}", "model.layers.0.mlp.up_proj": "{quantize: {bits: 99}}"}))
    lines = complains("apply", tiny, plan, "-o", tmp_path / "out", "--dtype", "float12", *SMALL)
    assert [line.split(": ")[0] for line in lines[:2]] == [f"{plan}:3", f"{plan}:4"]
    assert "float12" in lines[2]


def test_a_plan_of_another_model(tiny: Path, broken: Path, tmp_path: Path, complains: Complains) -> None:
    plan = tmp_path / "plan.yaml"
    assert main(["plan", str(tiny), "-b", "bits=4", "-r", "rtn", "-o", str(plan), *SMALL]) == 0
    state = load_file(broken / "model.safetensors")
    save_file({k: v * 1.01 for k, v in state.items()}, broken / "model.safetensors", metadata={"format": "pt"})
    (line,) = complains("apply", broken, plan, "-o", tmp_path / "out", *SMALL)
    assert f"made for {tiny}" in line and "not for this model" in line


# -- data -------------------------------------------------------------------------------------------------------------


def arrays(file: Path, shape: tuple[int, ...] = (4, 1, 8, 8), label: int = 1, value: float = 0.5) -> Path:
    x = numpy.zeros(shape, dtype="float32")
    x.flat[0] = value
    numpy.savez(file, x=x, y=numpy.full(shape[0], label))
    return file


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: write(f / "empty.txt", ""), "empty.txt holds no text"),
        (lambda f: write(f / "short.txt", "hello"), r"has 6 tokens, fewer than one window of 32: give more text"),
        (lambda f: write(f / "one.txt", "x" * 50), "holds one sample: give at least two"),
        (lambda f: write(f / "bad.jsonl", '{"text": "a"}\n{'), r"bad.jsonl:2: not JSON"),
        (lambda f: write(f / "bad.jsonl", '{"txt": "a"}\n'), r'bad.jsonl:1: expected .*"text" field'),
        (lambda f: arrays(f / "x.npz"), "is a .npz file; text is read from .txt"),
        (lambda f: f, "is a folder, and .* reads text"),
    ],
)
def test_text(make: Callable[[Path], Path], message: str, tiny: Path, tmp_path: Path, complains: Complains) -> None:
    (line,) = complains("check", tiny, "-b", "bits=4", "--data", make(tmp_path), *SMALL)
    assert re.search(message, line), line


@pytest.mark.parametrize("model", ["demo:vit", "demo:cnn"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f, s: arrays(f / "nan.npz", s, value=float("nan")), "batch 0 holds NaN or infinite values"),
        (
            lambda f, s: arrays(f / "rgb.npz", (4, 3, *s[2:])),
            r"got samples of shape \(3, .*takes \(channels, height, width\)",
        ),
        (lambda f, s: arrays(f / "labels.npz", s, label=10), "labels reach from 10 to 10, and demo:.* has 10 classes"),
        (
            lambda f, s: write(f / "none.npz", b""),
            "is not a readable .npz",
        ),
        (lambda f, s: write(f / "zip.npz", b"PK\x03\x04 half a file"), "is not a readable .npz"),
        (lambda f, s: write(f / "corpus.txt", "text"), r"corpus.txt is a .txt file, and demo:.* reads images"),
        (lambda f, s: f / "gone.npz", "no data at .*gone.npz"),
        (lambda f, s: f, "holds no images in class folders"),
    ],
)
def test_images(
    make: Callable[[Path, tuple[int, ...]], Path], message: str, model: str, tmp_path: Path, complains: Complains
) -> None:
    shape = (4, 1, 8, 8) if model == "demo:vit" else (4, 1, 32, 32)
    data = make(tmp_path, shape)
    (line,) = complains("inspect", model, "--data", data)
    assert re.search(message, line), line


# -- outputs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    file = tmp_path / "plan.yaml"
    file.write_text(plan_text(**{UP: Q4}))
    return file


def test_folders_that_hold_something_else(tiny: Path, planned: Path, tmp_path: Path, complains: Complains) -> None:
    write(tmp_path / "file", "x")
    (tmp_path / "photos").mkdir()
    write(tmp_path / "photos" / "cat.jpg", "x")
    for command in (["apply", tiny, planned], ["optimize", tiny, "-b", "bits=4"], ["tune", tiny, "-m", "full"]):
        (line,) = complains(*command, "-o", tmp_path / "photos", "--force", *SMALL)
        assert "photos already holds something else (cat.jpg): give another folder" in line
        (line,) = complains(*command, "-o", tmp_path / "file", *SMALL)
        assert "file is a file: give a folder" in line
    (line,) = complains("plan", tiny, "-b", "bits=4", "-o", tmp_path / "photos", *SMALL)
    assert "photos is a folder: give the file to write" in line
    (line,) = complains("inspect", tiny, "-o", tmp_path / "file", *SMALL)
    assert "file is a file: give a folder" in line


def test_a_finished_output_is_replaced_only_with_force(
    tiny: Path, planned: Path, tmp_path: Path, complains: Complains
) -> None:
    out = tmp_path / "out"
    assert main(["apply", str(tiny), str(planned), "-o", str(out), *SMALL]) == 0
    first = (out / "model-00002.safetensors").read_bytes()
    (line,) = complains("apply", tiny, planned, "-o", out, *SMALL)
    assert "already holds a finished output" in line and "pass --force to replace it" in line
    planned.write_text(plan_text(**{UP: "{quantize: {bits: 3}}"}))
    assert main(["apply", str(tiny), str(planned), "-o", str(out), "--force", *SMALL]) == 0
    assert (out / "model-00002.safetensors").read_bytes() != first


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    class Status:
        def __init__(self, path: Any) -> None:
            self.real = real(path)
            self.f_flag = self.real.f_flag | os.ST_RDONLY

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    monkeypatch.setattr(os, "statvfs", Status)


def test_a_read_only_disk(
    tiny: Path, planned: Path, tmp_path: Path, complains: Complains, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_only(monkeypatch)
    for command in (["apply", tiny, planned], ["optimize", tiny, "-b", "bits=4"], ["plan", tiny, "-b", "bits=4"]):
        (line,) = complains(*command, "-o", tmp_path / "out", *SMALL)
        assert "out cannot be written (read-only): give a" in line


@pytest.mark.parametrize("command", ["apply", "apply --whole", "optimize"])
def test_a_full_disk(
    command: str, tiny: Path, planned: Path, tmp_path: Path, complains: Complains, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(_: object, path: Path, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    name, *options = command.split()
    what = [planned] if name == "apply" else ["-b", "bits=4", "-r", "rtn", "--no-uniform"]
    (line,) = complains(name, tiny, *what, *options, "-o", tmp_path / "out", *SMALL)
    assert "cannot be written" in line and "is the disk full or read-only?" in line


def test_too_little_room_is_seen_beforehand(
    tiny: Path, tmp_path: Path, complains: Complains, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    (line,) = complains("check", tiny, "-b", "bits=4", "-o", tmp_path / "out", *SMALL)
    assert "0 MB free, and the output takes" in line


def test_scores_of_another_model(tiny: Path, broken: Path, tmp_path: Path, complains: Complains) -> None:
    scores = tmp_path / "scores"
    common = ["-b", "bits=4", "-r", "mixed", "--scores", scores, "-o", tmp_path / "plan.yaml", *SMALL]
    assert main([str(a) for a in ["plan", tiny, *common]]) == 0
    state = load_file(broken / "model.safetensors")
    save_file({k: v * 1.01 for k, v in state.items()}, broken / "model.safetensors", metadata={"format": "pt"})
    (line,) = complains("plan", broken, *common)
    assert "fisher.json was measured on another model" in line
    (scores / "fisher.json").write_text("{")
    (line,) = complains("plan", tiny, *common)
    assert "fisher.json is not a scores file of this version" in line
