from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.models.text_gan import SurpriseDiscriminator, TextGenerator
from layerwright.nn.sequence_core import CoreKind, SequenceCore

CORES: list[CoreKind] = ["lstm", "gru", "transformer"]


def generator(core: CoreKind | SequenceCore = "lstm", **settings: Any) -> TextGenerator:
    return TextGenerator(11, 8, 8, 6, core, **settings)


def sentences(count: int = 5, tokens: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 11, (count, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("core", CORES)
def test_a_word_depends_on_earlier_words_alone(core: CoreKind) -> None:
    model, ids = generator(core).double(), sentences()
    logs = model(ids)
    assert logs.shape == (5, 6, 11)
    torch.testing.assert_close(logs.exp().sum(2), torch.ones(5, 6, dtype=torch.float64))
    torch.testing.assert_close(model.word_log_probs(ids), logs.gather(2, ids[..., None])[..., 0])
    for place in range(6):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] + 3) % 11
        after = model(changed)
        assert torch.equal(after[:, : place + 1], logs[:, : place + 1])
        if place < 5:
            assert not torch.allclose(after[:, place + 1], logs[:, place + 1])
    torch.testing.assert_close(model(ids[:, :3]), logs[:, :3])


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_cached_sampling_is_full_recomputation(core: CoreKind, temperature: float) -> None:
    model = generator(core).double()
    draws = [
        model.sample(40, torch.Generator().manual_seed(3), temperature, cached=cached, batch=16)
        for cached in (True, False)
    ]
    assert torch.equal(draws[0][0], draws[1][0])
    torch.testing.assert_close(draws[0][1], draws[1][1])
    ids, logs = draws[0]
    assert ids.shape == logs.shape == (40, 6)
    expected = (model(ids) / temperature).log_softmax(2).gather(2, ids[..., None])[..., 0]
    torch.testing.assert_close(logs, expected)
    assert not torch.equal(model.sample(40, torch.Generator().manual_seed(4))[0], ids)


@pytest.mark.parametrize("core", CORES)
def test_samples_follow_the_probabilities(core: CoreKind) -> None:
    model = TextGenerator(4, 8, 8, 2, core)
    ids, _ = model.sample(40_000, torch.Generator().manual_seed(0), batch=40_000)
    seen = (ids[:, 0] * 4 + ids[:, 1]).bincount(minlength=16) / 40_000
    every = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    p = model.word_log_probs(every).sum(1).exp().detach()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    assert bool(((seen - p).abs() < 4 * (p * (1 - p) / 40_000).sqrt() + 1e-6).all())


def test_a_deterministic_generator_has_no_nats() -> None:
    model = generator()
    with torch.no_grad():
        model.project.weight.zero_()
        model.project.bias.zero_()[4] = 1000.0
    ids, logs = model.sample(20, torch.Generator().manual_seed(0))
    assert bool((ids == 4).all()) and float(logs.abs().max()) == 0.0


@pytest.mark.parametrize("core", CORES)
def test_reward_is_surprise(core: CoreKind) -> None:
    judge, ids = SurpriseDiscriminator(11, 8, 8, 6, core), sentences()
    assert judge.reward(ids)[0].requires_grad
    with torch.no_grad():
        word, sentence = judge.reward(ids)
        logs = judge(ids)
    assert word.shape == (5, 6) and sentence.shape == (5, 1)
    for row in range(5):
        expected = [-float(logs[row, t, ids[row, t]]) for t in range(6)]
        assert word[row].tolist() == pytest.approx(expected, rel=1e-5)
        assert float(sentence[row]) == pytest.approx(sum(expected) / 6, rel=1e-5)


@torch.no_grad()
def test_starts() -> None:
    recurrent = TextGenerator(500, 32, 32, 6)
    assert float(recurrent.embedding.weight.std()) == pytest.approx(500**-0.5, rel=0.05)
    assert float(recurrent.core.cell.weight_ih_l0.std()) == pytest.approx(128**-0.5, rel=0.05)  # type: ignore[arg-type]
    post = TextGenerator(500, 32, 32, 6, "transformer")
    assert float(post.embedding.weight[2:].std()) == pytest.approx(1.0, rel=0.05)
    pre = TextGenerator(500, 32, 32, 6, SequenceCore("transformer", norm="pre"))
    assert float(pre.embedding.weight[2:].std()) == pytest.approx(32**-0.5, rel=0.05)
    assert float(pre.embedding.weight[0].abs().max()) == 0.0
    before = torch.get_rng_state()
    assert torch.equal(generator(seed=3)(sentences()), generator(seed=3)(sentences()))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(generator(seed=4)(sentences()), generator(seed=3)(sentences()))


@pytest.mark.parametrize("core", CORES)
def test_bfloat16_and_forms(core: CoreKind) -> None:
    model, ids = generator(core), sentences()
    half = generator(core).bfloat16()
    assert half(ids).dtype == torch.float32
    torch.testing.assert_close(half(ids), model(ids), atol=0.15, rtol=0.1)
    drawn, logs = half.sample(8, torch.Generator().manual_seed(0))
    assert bool(logs.isfinite().all()) and int(drawn.max()) < 11
    again = TextGenerator.empty(model.spec())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids), model(ids))


def test_bad_input() -> None:
    model = generator()
    with pytest.raises(InputError, match="got 7 tokens, expected 1 to max_len=6"):
        model(sentences(tokens=7))
    with pytest.raises(InputError, match="expected 0 to 10"):
        model(sentences() + 5)
    with pytest.raises(InputError, match="expected 0 to 10"):
        SurpriseDiscriminator(11, 8, 8, 6).reward(sentences() - 1)
    with pytest.raises(InputError, match="whole numbers"):
        model(torch.rand(2, 3))
    with pytest.raises(InputError, match="start_id, pad_id: both are 1"):
        generator(pad_id=1)
    with pytest.raises(InputError, match="start_id: got 11"):
        generator(start_id=11)
    with pytest.raises(InputError, match="vocabulary: got 2"):
        TextGenerator(2)
    with pytest.raises(InputError, match="heads: got 3"):
        generator(SequenceCore("transformer", 8, 8, heads=3))
    with pytest.raises(InputError, match="core: reads 32"):
        generator(SequenceCore())
    with pytest.raises(InputError, match="expected at least max_len=6"):
        generator(SequenceCore("transformer", 8, 8, max_len=5))
    with pytest.raises(InputError, match="unknown init"):
        generator(init="zeros")
    for settings in ({"count": 0}, {"count": 3, "temperature": 0.0}, {"count": 3, "temperature": math.nan}):
        with pytest.raises(InputError, match="count, batch, temperature"):
            model.sample(**settings)  # type: ignore[arg-type]
