from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.nn.random_mask import keep_tokens, mask_of, random_mask, restore_tokens


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 80), st.floats(0.01, 0.99), st.integers(1, 4), st.integers(0, 1000))
def test_exactly_the_share_is_kept_and_the_order_is_put_back(n: int, ratio: float, batch: int, seed: int) -> None:
    kept = round(n * (1 - ratio))
    if not 1 <= kept < n:
        with pytest.raises(InputError, match="token"):
            random_mask(n, ratio)
        return
    found = random_mask(n, ratio, torch.Generator().manual_seed(seed), batch=batch)
    assert found.ids_keep.shape == (batch, kept)
    assert found.mask.sum(1).tolist() == [n - kept] * batch
    assert torch.equal(found.ids_restore.sort(1).values, torch.arange(n).expand(batch, n))
    for row in range(batch):
        assert not found.mask[row, found.ids_keep[row]].any()
    tokens = torch.randn(batch, n, 3)
    back = restore_tokens(keep_tokens(tokens, found.ids_keep), torch.full((3,), 7.0), found.ids_restore)
    hidden = found.mask.bool()
    assert torch.equal(back[~hidden], tokens[~hidden])
    assert (back[hidden] == 7).all()


def test_restore_inverts_the_shuffle() -> None:
    noise = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    found = random_mask(12, 0.75, noise=noise)
    shuffled = noise.argsort(1)
    assert torch.equal(shuffled.gather(1, found.ids_restore), torch.arange(12).expand(5, 12))
    assert torch.equal(found.ids_keep, shuffled[:, :3])


def test_same_generator_same_mask() -> None:
    one, two = (random_mask(64, 0.75, torch.Generator().manual_seed(3), batch=8) for _ in range(2))
    assert torch.equal(one.mask, two.mask)
    assert not torch.equal(one.mask, random_mask(64, 0.75, torch.Generator().manual_seed(4), batch=8).mask)
    assert len(one.mask.unique(dim=0)) > 1


def test_masks_of_ones_own() -> None:
    masked = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]])
    found = mask_of(masked)
    assert found.ids_keep.tolist() == [[1, 3], [0, 1]]
    assert torch.equal(found.mask, masked.float())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: random_mask(8, 0.0), "expected a share inside"),
        (lambda: random_mask(8, 1.0), "expected a share inside"),
        (lambda: random_mask(8, float("nan")), "expected a share inside"),
        (lambda: random_mask(4, 0.95), "leaves no visible token"),
        (lambda: random_mask(4, 0.05), "leaves no masked token"),
        (lambda: random_mask(4, 0.5, noise=torch.rand(2, 5)), "noise: got shape"),
        (lambda: random_mask(4, 0.5, batch=0), "batch: got 0"),
        (lambda: mask_of(torch.tensor([[1, 0], [0, 0]])), "expected equal numbers"),
        (lambda: mask_of(torch.ones(2, 3)), "no visible token"),
        (lambda: mask_of(torch.ones(3)), "mask: got shape"),
    ],
)
def test_bad_input(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()  # type: ignore[operator]
