from __future__ import annotations

import torch

from layerwright.data import library_groups
from layerwright.data.library_groups import LENGTH, LIBRARY_GROUPS, library_pieces


def test_pieces_are_of_their_own_part() -> None:
    train, labels = library_pieces("train", 22)
    assert labels.bincount().tolist() == [6, 6, 5, 5]
    for part, chunks, own in (("train", train, labels), ("heldout", *library_pieces("heldout", 12))):
        texts = library_groups._group_files(part)  # type: ignore[arg-type]
        assert len(texts) == len(LIBRARY_GROUPS)
        for chunk, label in zip(chunks, own.tolist(), strict=True):
            assert len(chunk) == LENGTH
            assert any(bytes(chunk.tolist()) in text for text in texts[label])
    seen = {text for group in library_groups._group_files("train") for text in group}
    assert not any(text in seen for group in library_groups._group_files("heldout") for text in group)
    assert torch.equal(library_pieces("train", 22)[0], train)
    assert not torch.equal(library_pieces("train", 22, seed=1)[0], train)
