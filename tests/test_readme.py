"""What README and documentation say runs, and the names they use exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import pytest
import typer.main
import yaml

from layerwright.allocate import ALLOCATORS
from layerwright.cli.app import app
from layerwright.core.recipe import Recipe
from layerwright.core.target import TARGETS
from layerwright.recipes.book import recipes
from layerwright.score import SCORERS
from layerwright.studies import study_slugs
from layerwright.treat.export import FORMATS
from layerwright.tune import TUNERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CARDS = sorted((ROOT / "src/layerwright/data/demo").glob("*/README.md"))
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    found: list[str] = []
    inside: str | None = None
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            inside = line[3:].strip() if inside is None else None
            if inside in languages:
                found.append("")
        elif inside in languages:
            found[-1] += line + "\n"
    return found


def commands(path: Path) -> list[str]:
    """Every ``layerwright ...`` in a shell block or in code style."""
    shell = "".join(blocks(path, "", "console"))
    found = re.findall(r"^(?:\$ )?layerwright +(.+)$", shell, re.MULTILINE)
    return found + re.findall(r"`layerwright ([^`\n]+)`", path.read_text())


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_python_runs(tmp_path: Path) -> None:
    code = blocks(ROOT / "README.md", "python")
    assert len(code) == 1
    printed = run(code[0], tmp_path)
    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) bytes", printed)]
    assert len(sizes) == 2
    assert sizes[1] < 0.4 * sizes[0]
    assert (tmp_path / "plan.yaml").is_file()
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("page", ["docs/index.md", "docs/rooms/core.md", "docs/rooms/recipes.md", "CONTRIBUTING.md"])
def test_documentation_python_runs(page: str, tmp_path: Path) -> None:
    code = blocks(ROOT / page, "python")
    assert code
    for block in code:
        run(block, tmp_path)


@pytest.mark.parametrize("page", PAGES + CARDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    names = {
        "--scores": SCORERS.names(),
        "--recipe": [item.name for item in recipes()],
        "--target": list(TARGETS),
        "--format": FORMATS.names(),
        "--method": TUNERS.names(),
    }
    for line in commands(page):
        words = shlex.split(re.sub(r"[\[\]]", " ", line), comments=True)
        assert words[0] in {*COMMANDS, "COMMAND"}, f"{page.name}: no command {words[0]!r} in {line!r}"
        if words[0] == "COMMAND":
            continue
        command = COMMANDS[words[0]]
        if hasattr(command, "commands"):  # a group: the second word names the command
            command = command.commands[words[1]]
        known = {flag for parameter in command.params for flag in parameter.opts} | {"--help"}
        for place, word in enumerate(words):
            if word.startswith("-"):
                assert word in known, f"{page.name}: {words[0]} has no option {word!r}"
            value = words[place + 1] if place + 1 < len(words) else ""
            if word in names and re.fullmatch(r"[a-z][\w,-]*", value):
                assert set(value.split(",")) <= set(names[word]), f"{page.name}: {word} {value}"
        if words[0] == "study" and words[1] != "SLUG":
            assert words[1] in {*study_slugs(), "all"}


@pytest.mark.parametrize("page", PAGES + CARDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_links_and_make_targets_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"python -m ([\w.]+)", text):
        assert util.find_spec(name) or (ROOT / f"{name.replace('.', '/')}.py").is_file(), f"{page.name}: {name}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shell = "".join(blocks(page, "", "console"))
    code = re.findall(r"`make ([a-z]+)`", text) + re.findall(r"^make ([a-z]+)", shell, re.MULTILINE)
    assert set(code) <= targets
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), f"{page.name}: {link}"
    for example in re.findall(r"`(examples/\w+\.py)`", text):
        assert (ROOT / example).is_file()


def test_readme_begins_with_two_commands() -> None:
    first = [block.strip() for block in blocks(ROOT / "README.md", "")]
    assert first == ["make demo", "make test"]


def test_systems_tables_are_current() -> None:
    from layerwright.studies import markdown_table
    from layerwright.studies.catalog import systems_page

    readme = (ROOT / "README.md").read_text()
    between = readme.split("<!-- systems:begin -->")[1].split("<!-- systems:end -->")[0]
    assert between.strip() == markdown_table().strip()
    assert (ROOT / "docs/systems.md").read_text().strip() == systems_page().strip()


def test_recipes_page_lists_every_recipe() -> None:
    listed = re.findall(
        r"^\| `([\w-]+)` \| (?:decider )?`\w+` \| *(?:`\w+` )?\|", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(item.name for item in recipes())


def test_recipes_page_example_is_a_recipe() -> None:
    (text,) = blocks(ROOT / "docs/recipes.md", "yaml")
    example = Recipe.from_data(yaml.safe_load(text))
    assert example.scorer in SCORERS
    assert example.allocator in ALLOCATORS
    assert len(example.candidates) == 3


@pytest.mark.parametrize(
    "room", ["nn", "data", "score", "allocate", "tune", "models", "explain", "recipes", "studies", "report"]
)
def test_room_page_documents_every_public_name(room: str) -> None:
    page = (ROOT / f"docs/rooms/{room}.md").read_text()
    documented = set(re.findall(rf"^::: layerwright\.{room}\.(\w+)$", page, re.MULTILINE))
    assert documented == set(import_module(f"layerwright.{room}").__all__)


def test_cli_page_lists_every_command() -> None:
    page = (ROOT / "docs/rooms/cli.md").read_text()
    assert set(re.findall(r"^\| `layerwright ([\w-]+)", page, re.MULTILINE)) == set(COMMANDS)


def test_navigation_names_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(yaml.safe_load(text)["nav"])))
    assert named == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


def test_import_contract_in_contributing_is_the_real_one() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    layers = re.search(r"^layers = (\[.*?\])", project, re.MULTILINE | re.DOTALL)
    assert layers
    rooms = [name.removeprefix("layerwright.") for name in reversed(ast.literal_eval(layers[1]))]
    assert " < ".join(rooms) in (ROOT / "CONTRIBUTING.md").read_text()
