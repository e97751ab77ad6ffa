"""Names of recipes on the command line: dashes and underscores count alike, and what cannot be served is said at once."""

from __future__ import annotations

import pytest

from layerwright.cli import main


@pytest.mark.parametrize("name", ["evol-q", "evol_q"])
def test_a_recipe_is_found_by_dashes_and_by_underscores(name: str) -> None:
    assert main(["check", "demo:vit", "-b", "bits=4", "-r", name, "--samples", "4"]) == 0


@pytest.mark.parametrize(
    ("model", "name", "offered"),
    [
        ("demo:lm", "lrp-qvit", "mixllm"),
        ("demo:cnn", "shortened_llama", "mixed_td"),
        ("demo:vit", "mixed-td", "lrp_qvit"),
    ],
)
def test_what_cannot_be_served_is_one_line_with_those_that_can(
    model: str, name: str, offered: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["check", model, "-b", "ms=0.9x" if name == "mixed-td" else "bits=4", "-r", name, "--samples", "4"]) == 2
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if "needs a model with" in line]
    assert len(lines) == 1
    assert offered in lines[0].partition("recipes for it: ")[2].split(", ")
