"""The transducer: shapes, padding, greedy decoding against a slow one, words, learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwright.data.speech import generated_speech
from layerwright.models.rnnt import RNNT
from layerwright.nn.elastic import ElasticStack, running_blocks
from layerwright.nn.subnet import SubnetConfig
from layerwright.nn.transducer_loss import transducer_loss
from layerwright.score.token_errors import token_error_rate
from layerwright.train import Eden, ScaledAdam

SMALL: dict[str, Any] = {"dim": 8, "heads": 2, "state_size": 4, "predictor_dim": 6, "joiner_dim": 10}


def network(**options: Any) -> RNNT:
    return RNNT(12, 9, 3, (4, 8), **(SMALL | options))


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_nothing(stack: int, bidirectional: bool) -> None:
    model = network(stack=stack, bidirectional=bidirectional).eval()
    speech = generated_speech(5, 2)
    batch = next(speech.batches(5))
    whole = model(**batch)
    assert whole.logits.shape[:1] + whole.logits.shape[2:] == (5, batch["targets"].shape[1] + 1, 9)
    for row, (features, labels) in enumerate(zip(speech.features, speech.labels, strict=True)):
        own = model(features[None], torch.tensor([len(features)]), torch.tensor([labels]))
        frames = -(-len(features) // stack)
        assert int(whole.frame_lengths[row]) == frames == own.logits.shape[1]
        assert torch.allclose(whole.logits[row, :frames, : len(labels) + 1], own.logits[0], atol=1e-5)
    torch.manual_seed(0)
    noisy = batch["features"] + torch.randn_like(batch["features"]) * (batch["features"] == 0)
    changed = model(noisy, *(batch[key] for key in ("feature_lengths", "targets")))
    assert torch.allclose(
        changed.logits[0, : whole.frame_lengths[0]], whole.logits[0, : whole.frame_lengths[0]], atol=1e-5
    )


def slow_greedy(model: RNNT, features: torch.Tensor, limit: int) -> list[int]:
    """One sample, the whole prefix read anew for every symbol."""
    frames, _ = model.encode(features[None], torch.tensor([len(features)]))
    said: list[int] = []
    for t in range(frames.shape[1]):
        for _ in range(limit):
            prefix = model.predict(torch.tensor([said], dtype=torch.long).reshape(1, -1))[:, -1:]
            symbol = int(model.join(frames[:, t : t + 1], prefix).argmax())
            if symbol == model.blank:
                break
            said.append(symbol)
    return said


@pytest.mark.parametrize("blank", [0, 4])
@pytest.mark.parametrize("limit", [1, 3])
def test_greedy(blank: int, limit: int) -> None:
    model = network(blank=blank).eval()
    with torch.no_grad():
        model.joiner.output.weight.mul_(6)  # unlike symbols
        model.joiner.output.bias[blank] += 1.0
    speech = generated_speech(7, 2)
    batch = next(speech.batches(7))
    found = model.greedy(batch["features"], batch["feature_lengths"], limit)
    assert found == [slow_greedy(model, features, limit) for features in speech.features]
    assert len({tuple(own) for own in found}) > 1 and any(found)
    alone = speech.features[0]
    assert model.greedy(alone[None], max_symbols=limit) == [found[0]]
    with torch.no_grad():
        model.joiner.output.bias[blank] += 1e4
    assert model.greedy(batch["features"], batch["feature_lengths"]) == [[]] * 7


def test_it_learns() -> None:
    speech = generated_speech(160, 1, symbols=3, noise=0.1)
    heldout = generated_speech(60, 2, symbols=3, noise=0.1)
    model = RNNT(12, 4, 2, (32,), dim=16, heads=4, state_size=4)
    optimizer = ScaledAdam(model.parameters(), lr=0.06, clipping_scale=2.0)
    schedule = Eden(optimizer, batches=200, epochs=20, warmup_batches=5)
    generator = torch.Generator().manual_seed(0)
    before = token_error_rate(model.greedy(*_inputs(heldout)), heldout.labels)
    for _ in range(14):
        for batch in speech.batches(16, generator):
            outputs = model(**batch)
            loss = transducer_loss(outputs.logits, batch["targets"], outputs.frame_lengths, batch["target_lengths"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step_batch()
        schedule.step_epoch()
    after = token_error_rate(model.eval().greedy(*_inputs(heldout)), heldout.labels)
    assert after < 0.3 < before


def _inputs(speech: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = next(speech.batches(len(speech)))
    return batch["features"], batch["feature_lengths"]


def test_words_and_settings() -> None:
    model = network(stack=2, dropout=0.1)
    assert model.to_spec() == ["elastic-4-8"] * 3
    assert isinstance(model.blocks, ElasticStack)
    again = RNNT.from_spec(model.to_spec(), **model.settings())
    assert again.settings() == model.settings() and again.to_spec() == model.to_spec()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    plain = RNNT(12, 9, 2, (8,), **SMALL)
    assert plain.to_spec() == ["ffn-8"] * 2 and not isinstance(plain.blocks, ElasticStack)
    assert RNNT(12, 9, 2, (8,), elastic=True, **SMALL).to_spec() == ["elastic-8"] * 2
    mixed = RNNT.from_spec(["ffn-4", "ffn-6"], channels=12, symbols=9, **SMALL)
    assert len(list(running_blocks(mixed.blocks))) == 2
    assert {"bidirectional": False, "channels": 12, "dim": 8}.items() <= mixed.settings().items()


def test_first_weights_come_from_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    models = [network(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    values = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    # Nothing of several numbers is all zeros: ScaledAdam could not move it.
    assert all(bool(p.any()) for p in models[0].parameters())


def test_half_precision() -> None:
    model = network().eval()
    batch = next(generated_speech(3, 1).batches(3))
    expected = model(**batch).logits
    batch["features"] = batch["features"].bfloat16()
    found = model.bfloat16()(**batch).logits
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), expected, atol=0.1)


def test_fewer_blocks_and_widths() -> None:
    model = network().eval()
    assert isinstance(model.blocks, ElasticStack)
    batch = next(generated_speech(3, 1).batches(3))
    whole = model(**batch).logits
    model.blocks.activate_(SubnetConfig((1,), (4,)))
    x, _ = model.encode(batch["features"], batch["feature_lengths"])
    mask = torch.arange(x.shape[1]) < batch["feature_lengths"][:, None]
    expected = model.norm(model.blocks[1](model.frontend(batch["features"]), mask))
    assert torch.allclose(x[mask], expected[mask], atol=1e-5)
    assert not torch.allclose(model(**batch).logits, whole, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network(dim=0), "dim"),
        (lambda: network(heads=3), "heads"),
        (lambda: network(stack=0), "stack"),
        (lambda: network(blank=9), "blank"),
        (lambda: network(dropout=1.0), "dropout"),
        (lambda: network(elastic=False), "plain encoder"),
        (lambda: RNNT(12, 1), "symbols"),
        (lambda: RNNT(12, 9, 0), "blocks"),
        (lambda: RNNT(12, 9, 2, ()), "widths"),
        (lambda: RNNT.from_spec(["conv-3"], channels=12, symbols=9), "spec"),
        (lambda: RNNT.from_spec([], channels=12, symbols=9), "spec"),
        (lambda: RNNT.from_spec(["ffn-4", "elastic-4-8"], channels=12, symbols=9), "spec"),
        (lambda: RNNT.from_spec(["ffn-4-8"], channels=12, symbols=9), "plain encoder"),
        (lambda: network().encode(torch.zeros(2, 5, 11), torch.tensor([5, 5])), "features"),
        (lambda: network().encode(torch.zeros(2, 5, 12), torch.tensor([5, 6])), "feature_lengths"),
        (lambda: network().encode(torch.zeros(2, 5, 12), torch.tensor([0, 5])), "feature_lengths"),
        (lambda: network().encode(torch.zeros(2, 5, 12), torch.tensor([5])), "feature_lengths"),
        (lambda: network().greedy(torch.zeros(2, 5, 12), max_symbols=0), "max_symbols"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
