from __future__ import annotations

import pytest
import torch

from layerwright.studies.swiftformer import (
    FAR,
    GREY,
    PALETTE,
    WHITE,
    SoftmaxAttention,
    commonest_colour,
    context_network,
    exponent,
    run,
)


def test_the_label_is_whether_the_framed_colour_leads_in_the_field() -> None:
    images, labels = commonest_colour(300, seed=5)
    assert images.shape == (300, 3, 32, 32) and 0.4 < float(labels.double().mean()) < 0.6
    colours = torch.cdist(images.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(2).mT, PALETTE).argmin(-1)
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    for picture, label in zip(colours.view(-1, 8, 8), labels, strict=True):
        around = torch.nn.functional.conv2d((picture == WHITE).float()[None, None], torch.ones(1, 1, 3, 3), padding=1)
        framed = ((picture < GREY) & (around[0, 0] >= 3)).nonzero()
        assert len(framed) == 1
        row, column = framed[0].tolist()
        away = torch.maximum((rows - row).abs(), (columns - column).abs())
        assert torch.equal(picture < GREY, (away == 0) | (away >= FAR)) and torch.equal(picture == WHITE, away == 1)
        reds = float((picture[away >= FAR] == 0).double().mean())
        assert max(reds, 1 - reds) >= 0.75
        assert int(label) == int((picture[row, column] == 0) == (reds > 0.5))
    assert torch.equal(images, commonest_colour(300, seed=5)[0])


def _mixed_difference(attention: str) -> float:
    """How far the two changes of a picture, of the framed colour and of the field, are from adding up in the logits."""
    torch.manual_seed(3)
    model = context_network(attention).eval()
    cells = torch.full((4, 8, 8), GREY)
    cells[:, 0:3, 2:5] = WHITE
    cells[:, 1, 3] = torch.tensor([0, 0, 1, 1])
    cells[:, 5:] = torch.tensor([0, 1, 0, 1])[:, None, None]
    cells[:, :, 7] = torch.tensor([0, 1, 0, 1])[:, None]
    images = PALETTE[cells].permute(0, 3, 1, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        logits = model.double()(images.double())
    return float((logits[0] - logits[1] - logits[2] + logits[3]).abs().max())


def test_only_attention_brings_the_framed_colour_and_the_field_together() -> None:
    assert _mixed_difference("none") < 1e-12
    assert _mixed_difference("additive") > 1e-4


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
