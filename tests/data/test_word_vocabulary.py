from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwright.core.errors import CheckpointError, InputError
from layerwright.data.word_vocabulary import WordVocabulary, split_sentences

TEXT = "The cat sat. The dog's bone wasn't there!\n\nWho knows? The cat (again)."


def test_words_there_and_back(tmp_path: Path) -> None:
    sentences = split_sentences([TEXT])
    assert sentences == ["The cat sat.", "The dog's bone wasn't there!", "Who knows?", "The cat (again)."]
    words = WordVocabulary.from_texts(sentences)
    assert words.words[:6] == ("<pad>", "<start>", "<unknown>", "the", ".", "cat")
    ids = words.encode(sentences, 8)
    assert ids.shape == (4, 8) and ids.dtype == torch.long
    assert words.decode(ids)[1] == "the dog's bone wasn't there !"
    assert words.decode(ids)[3] == "the cat ( again ) ."
    words.save(tmp_path / "words.json")
    again = WordVocabulary.load(tmp_path / "words.json")
    assert again.words == words.words and torch.equal(again.encode(sentences, 8), ids)


def test_commonest_words_alone() -> None:
    words = WordVocabulary.from_texts(["b b b a a c d"], size=5)
    assert words.words[3:] == ("b", "a")
    assert words.encode(["a c b"], 4).tolist() == [[4, 2, 3, 0]]
    assert words.encode(["a b a b"], 2).tolist() == [[4, 3]]
    assert WordVocabulary.from_texts(["b b b a a c d"], least=2).words[3:] == ("b", "a")
    assert words.decode(torch.tensor([[4, 0, 3], [2, 3, 4]])) == ["a", "<unknown> b a"]


def test_bad_input(tmp_path: Path) -> None:
    words = WordVocabulary.from_texts(["a"])
    with pytest.raises(InputError, match="number 1 holds no word"):
        words.encode(["a", " "], 3)
    with pytest.raises(InputError, match="expected at least one text"):
        words.encode([], 3)
    with pytest.raises(InputError, match="expected 0 to 3"):
        words.decode(torch.tensor([[9]]))
    with pytest.raises(InputError, match="got no word"):
        WordVocabulary.from_texts(["", " "])
    with pytest.raises(InputError, match="size, least"):
        WordVocabulary.from_texts(["a"], size=3)
    with pytest.raises(InputError, match="different words"):
        WordVocabulary(["<pad>", "<start>", "<unknown>", "a", "a"])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no word vocabulary"):
        WordVocabulary.load(tmp_path / "other.json")
