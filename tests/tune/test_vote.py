from __future__ import annotations

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.tune.vote import fit_temperatures, vote
from oracles.luc import voted


def logits(exits: int = 3, tokens: int = 4, size: int = 7) -> torch.Tensor:
    return torch.randn(exits, tokens, size, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize("rule", ["max", "mean", "entropy"])
def test_identical_exits_vote_for_what_each_says(rule: str) -> None:
    one = logits(1)
    torch.testing.assert_close(vote(one.expand(3, -1, -1), rule), one[0].softmax(-1))  # type: ignore[arg-type]
    found = vote(logits(), rule)  # type: ignore[arg-type]
    torch.testing.assert_close(found.sum(-1), torch.ones(4))
    assert found.dtype == torch.float32


def test_max_equals_a_loop_and_takes_the_surest_exit() -> None:
    x = logits()
    slow = [voted(x[:, t].double().softmax(-1).tolist()) for t in range(4)]
    torch.testing.assert_close(vote(x).double(), torch.tensor(slow, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    probabilities = x.softmax(-1)
    assert torch.equal(vote(x).argmax(-1), probabilities.amax(0).argmax(-1))
    assert vote(x.bfloat16()).dtype == torch.float32


def test_entropy_trusts_the_sharper_exit() -> None:
    sharp, flat = torch.tensor([4.0, 0, 0, 0]), torch.tensor([0, 0.1, 0, 0])
    both = torch.stack([sharp, flat])
    assert vote(both, "entropy")[0] > vote(both, "mean")[0]


def test_choices_are_restricted_before_voting() -> None:
    x = logits()
    found = vote(x, choices=[1, 4])
    assert set(found.nonzero()[:, 1].tolist()) == {1, 4}
    torch.testing.assert_close(found[:, [1, 4]], vote(x[..., [1, 4]]))


def test_temperatures_undo_a_scale() -> None:
    generator = torch.Generator().manual_seed(2)
    true = torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator)[:, 0]
    found = fit_temperatures(torch.stack([true, true * 3, true / 2]), labels)
    torch.testing.assert_close(found, torch.tensor([1.0, 3.0, 0.5]) * found[0], rtol=1e-3, atol=1e-3)
    assert abs(float(found[0]) - 1) < 0.1
    sharpened = torch.stack([true, true * 3])
    torch.testing.assert_close(vote(sharpened, temperatures=[1.0, 3.0]), true.softmax(-1))


def test_bad_votes_are_refused() -> None:
    with pytest.raises(InputError, match="rule"):
        vote(logits(), "loudest")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shape"):
        vote(torch.zeros(3))
    for wrong in ([1.0], [1.0, 0.0, 1.0]):
        with pytest.raises(InputError, match="temperatures"):
            vote(logits(), temperatures=wrong)
    for choices in ([], [7], [-1]):
        with pytest.raises(InputError, match="choices"):
            vote(logits(), choices=choices)
    with pytest.raises(InputError, match="labels"):
        fit_temperatures(logits(), torch.zeros(3, dtype=torch.int64))
