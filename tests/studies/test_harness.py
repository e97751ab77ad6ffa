from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import layerwright.studies as studies
from layerwright.core.errors import InputError
from layerwright.core.evidence import Check, Evidence
from layerwright.recipes.book import recipe
from layerwright.studies import (
    catalog,
    list_systems,
    markdown_table,
    run_studies,
    run_study,
    show_evidence,
    study_slugs,
    systems,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def evidence(holds: bool = True) -> Evidence:
    checks = (Check("small", 1.0, 2.0), Check("large", 3.0 if holds else 1.0, 2.0, ">="))
    return Evidence(
        "adaquant", "A claim.", [{"plan": "a", "loss": 1.5}, {"plan": "b", "ratio": 2}], checks, 1.0, (0, 1), ["[b]"]
    )


def pretend(monkeypatch: pytest.MonkeyPatch, found: Evidence) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def run(**settings: Any) -> Evidence:
        calls.append(settings)
        return found

    monkeypatch.setattr(studies, "import_module", lambda name: SimpleNamespace(run=run, name=name))
    return calls


@pytest.mark.parametrize("item", systems.SYSTEMS, ids=lambda item: item.slug)
def test_every_part_can_be_imported_and_lives_in_its_rooms(item: systems.System) -> None:
    for name in item.objects:
        assert callable(systems.resolve(name)), name
    assert set(item.rooms) <= {name.partition(".")[0] for name in item.objects}
    assert item.slug in study_slugs()


def test_the_recipes_of_a_system_exist() -> None:
    for name in systems.system("shortened-llama").recipes:
        assert recipe(name).drop_blocks or recipe(name).decider == "iterative_drop"


@pytest.mark.parametrize("item", systems.SYSTEMS, ids=lambda item: item.slug)
def test_dashes_and_underscores_of_a_slug_count_alike(item: systems.System) -> None:
    assert systems.system(item.slug.replace("-", "_")) is systems.system(item.slug) is item


def test_an_unknown_study_is_answered_with_close_names() -> None:
    with pytest.raises(InputError, match=r"shortened-lama.*did you mean shortened-llama"):
        run_study("shortened-lama")
    with pytest.raises(InputError, match="no such object"):
        systems.resolve("tune.nothing")


def test_the_verdict_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {item.verdict for item in list_systems()} == {"not run"}
    calls = pretend(monkeypatch, evidence())
    assert run_study("adaquant", quick=True, seeds=2) == evidence()
    assert calls == [{"quick": True, "seeds": 2, "progress": None}]
    found = {item.slug: item for item in list_systems()}
    assert found["adaquant"].verdict == "holds (quick)"
    assert found["shortened-llama"].verdict == "not run"
    assert found["adaquant"].to_data()["verdict"] == "holds (quick)"
    pretend(monkeypatch, evidence(holds=False))
    run_study("adaquant")
    assert {item.slug: item.verdict for item in list_systems()}["adaquant"] == "does not hold"
    kept = json.loads((tmp_path / "layerwright" / "verdicts.json").read_text())
    assert kept["adaquant"]["checks"][1]["holds"] is False
    assert list((tmp_path / "layerwright").iterdir()) == [tmp_path / "layerwright" / "verdicts.json"]


@pytest.mark.parametrize("content", ["", "not json", "[1]", '{"adaquant": 3}'])
def test_a_damaged_file_of_verdicts_is_no_verdict(content: str) -> None:
    path = systems.verdicts_file()
    path.parent.mkdir()
    path.write_text(content)
    assert {item.verdict for item in list_systems()} == {"not run"}


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    systems.save_verdict(evidence(), quick=False)
    assert {item.verdict for item in list_systems()} == {"not run"}


def test_seeds_are_checked() -> None:
    with pytest.raises(InputError, match="seeds"):
        run_study("adaquant", seeds=0)


def test_what_is_shown() -> None:
    tables: list[Any] = []
    lines: list[str] = []
    show_evidence(evidence(holds=False), lambda *args, **_: tables.append(args), lines.append)
    assert lines[0] == "adaquant: A claim."
    assert tables[0] == ("Measured", ["plan", "loss", "ratio"], [["a", 1.5, None], ["b", None, 2]])
    assert tables[1][2] == [["small", 1.0, "<= 2", "yes"], ["large", 1.0, ">= 2", "no"]]
    assert lines[1] == "note: [b]"
    assert lines[-1] == "verdict: does not hold (1 s, seeds 0, 1)"


def test_the_page_of_systems(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "systems.md"
    catalog.main(["--write", str(path)])
    page = path.read_text()
    assert markdown_table() in page
    for item in systems.SYSTEMS:
        assert f"## {item.slug}" in page
        assert f"https://arxiv.org/abs/{item.arxiv}" in page
    assert [item.slug for item in systems.SYSTEMS] == sorted(item.slug for item in systems.SYSTEMS)


def test_several_studies_in_order_and_their_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(monkeypatch, evidence())
    assert list(run_studies(["adaquant", "pk_mixer"], quick=True, seeds=1)) == [evidence()] * 2
    assert calls == [{"quick": True, "seeds": 1, "progress": None}] * 2
    assert {item.slug: item.verdict for item in list_systems()}["adaquant"] == "holds (quick)"
    for slugs, settings, message in (
        (["adaquant", "nothing"], {}, "nothing"), (["adaquant"], {"seeds": 0}, "seeds"), (["adaquant"], {"jobs": 0}, "jobs"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            run_studies(slugs, **settings)
    assert len(calls) == 2, "nothing runs before all names are known"


def test_studies_in_processes_of_their_own() -> None:
    seen: list[tuple[str, int, int]] = []
    (found,) = run_studies(["pk-mixer"], jobs=2, quick=True, seeds=1, progress=lambda *args: seen.append(args))
    assert found.slug == "pk-mixer" and found.table and seen == [("studies", 1, 1)]
    assert "(quick)" in {item.slug: item.verdict for item in list_systems()}["pk-mixer"]
