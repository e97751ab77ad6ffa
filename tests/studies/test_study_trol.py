from __future__ import annotations

import torch

from layerwright.studies._shape_questions import (
    CELLS,
    IMAGE_TOKEN,
    WORDS,
    draw_questions,
    draw_scenes,
    image_batches,
    text_batches,
)
from layerwright.studies.trol import run

NAMES = {number: word for word, number in WORDS.items()}


def answer(cells: list[int], question: list[int]) -> str:
    """The slow obvious answer."""
    colours = ["red", "green", "blue"]
    shapes = ["square", "cross", "ring"]
    full = [(place, *divmod(kind - 1, 3)) for place, kind in enumerate(cells) if kind]
    asked, first, second = (NAMES[token] for token in question[:3])
    if asked == "count":
        return str(sum(colours[colour] == first for _, colour, _ in full))
    if asked == "left":
        pairs = [(a, b) for a in full for b in full if colours[a[1]] == first and colours[b[1]] == second]
        return "yes" if any(a[0] % 4 < b[0] % 4 for a, b in pairs) else "no"
    found = {colours[colour] for _, colour, shape in full if shapes[shape] == first}
    return found.pop() if len(found) == 1 else "none"


def test_answers_are_right() -> None:
    questions = draw_questions(200, seed=3)
    seen = set()
    for cells, asked, answers in zip(
        questions.cells.tolist(), questions.question.tolist(), questions.answer.tolist(), strict=True
    ):
        assert 1 <= sum(kind > 0 for kind in cells) <= 3
        for question, given in zip(asked, answers, strict=True):
            assert NAMES[given] == answer(cells, question)
            seen.add(NAMES[given])
    assert {"0", "1", "2", "yes", "no", "none", "red", "green", "blue"} <= seen


def test_pictures_and_words_tell_the_same() -> None:
    questions = draw_questions(5, seed=0)
    words, pictures = text_batches(questions)[0], image_batches(questions, seed=0)[0]
    assert torch.equal(words["labels"], pictures["labels"])
    assert torch.equal(words["input_ids"][:, CELLS:], pictures["input_ids"][:, CELLS:])
    assert (pictures["input_ids"] == IMAGE_TOKEN).sum(1).tolist() == [CELLS] * 5
    assert torch.equal(words["input_ids"][:, :CELLS] != WORDS["empty"], questions.cells > 0)
    cells = torch.zeros(1, CELLS, dtype=torch.long)
    cells[0, 5] = 1 + 3 * 1 + 2  # a green ring in the second row and column
    image = draw_scenes(cells, seed=0)[0]
    inside = image[:, 4:8, 4:8]
    assert float(inside[1, 0].mean()) > 0.4 and float(inside[1, 1:3, 1:3].abs().mean()) < 0.3
    assert float(image[:, 8:].abs().mean()) < 0.2 and float(inside[0].abs().mean()) < 0.3


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    rows = {row["arm"]: row for row in evidence.table}
    assert list(rows) == ["plain, 4 blocks", "TroL", "plain, 8 blocks", "gates fixed at 1/2", "TroL, one step"]
    assert evidence.checks[2].holds
    assert rows["gates fixed at 1/2"]["parameters"] == rows["TroL"]["parameters"]
    assert all(0 < row["accuracy"] < 1 for row in evidence.table)
    assert rows["TroL"]["gate, image tokens"] != rows["TroL"]["gate, text"]
