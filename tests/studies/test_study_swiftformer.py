from __future__ import annotations

import pytest
import torch

from layerwright.studies.swiftformer import SoftmaxAttention, commonest_colour, exponent, run


def test_the_label_is_whether_the_framed_colour_leads() -> None:
    images, labels = commonest_colour(300, seed=5)
    assert images.shape == (300, 3, 32, 32) and 0.4 < float(labels.double().mean()) < 0.6
    cells = images.view(300, 3, 8, 4, 8, 4)
    inner = cells[:, :, :, 1:3, :, 1:3].mean((3, 5)).flatten(2).transpose(1, 2)
    frame = (cells[:, :, :, 0, :, 0] > 0.75).all(1).flatten(1)
    palette = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.2, 0.3, 0.9], [0.9, 0.8, 0.2]])
    colours = torch.cdist(inner, palette[None]).argmin(-1)
    assert (frame.sum(1) == 1).all()
    votes = torch.nn.functional.one_hot(colours, 4).sum(1)
    marked = colours[frame]
    assert torch.equal(votes.gather(1, marked[:, None])[:, 0] == votes.amax(1), labels == 1)
    assert torch.equal(images, commonest_colour(300, seed=5)[0])


@torch.no_grad()
def test_softmax_attention_is_its_definition() -> None:
    torch.manual_seed(0)
    layer, x = SoftmaxAttention(6), torch.randn(2, 7, 6)
    query, key, value = layer.qkv(x).chunk(3, -1)
    torch.testing.assert_close(layer(x), layer.out((query @ key.transpose(1, 2) / 6**0.5).softmax(-1) @ value))


def test_exponents_are_slopes_of_logarithms() -> None:
    assert exponent([{"tokens": n, "t": 5.0 * n**1.3} for n in (10, 20, 80)], "t") == pytest.approx(1.3)


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "swiftformer" and evidence.seeds == (0,)
    accuracies = {row["arm"]: row["accuracy"] for row in evidence.table if "accuracy" in row}
    assert set(accuracies) == {"needle, additive", "needle, softmax", "context, additive", "context, none"}
    assert evidence.checks[2].measured == accuracies["needle, additive"]
    assert evidence.checks[2].bound == pytest.approx(accuracies["needle, softmax"] - 0.02)
    assert evidence.checks[3].bound == pytest.approx(accuracies["context, none"] + 0.05)
    kept = [row["additive, MB kept"] for row in evidence.table if "tokens" in row]
    assert kept[-1] / kept[0] == pytest.approx(3136 / 196, rel=0.05), "linear in the tokens"
