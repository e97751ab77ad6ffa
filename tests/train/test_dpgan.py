from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwright.core.errors import CheckpointError, InputError, LayerwrightError
from layerwright.models.text_gan import SurpriseDiscriminator, TextGenerator
from layerwright.train.dpgan import (
    DivergedError,
    DPGANConfig,
    DPGANHistory,
    discriminator_loss,
    dpgan_returns,
    generator_sample,
    train_dpgan,
)
from oracles import sadpgan as oracle

SHORT = {"mle_epochs": 2, "d_pre_steps": 2, "d_pre_epochs": 1, "adversarial_epochs": 4, "d_steps": 2, "d_epochs": 1,
         "batch": 16, "eval_samples": 20}  # fmt: skip


def models(core: Any = "lstm", seed: int = 0) -> tuple[TextGenerator, SurpriseDiscriminator]:
    return (
        TextGenerator(9, 8, 8, 5, core, seed=seed),
        SurpriseDiscriminator(9, 8, 8, 5, core, seed=seed + 100),
    )


def sentences(count: int = 64, seed: int = 0) -> Tensor:
    """Words 2 to 8 that rise by one, with a random beginning, then padding."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(2, 6, (count, 1), generator=draw)
    ids = first + torch.arange(5)
    return ids.masked_fill(ids > 8, 0)


def config(**changes: Any) -> DPGANConfig:
    return DPGANConfig(**(SHORT | changes))


rows = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(st.floats(0, 20), min_size=n, max_size=n), min_size=1, max_size=4)
)


@settings(deadline=None)
@given(rows, st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([None, 3.0, 12.0]))
def test_returns_are_a_double_loop(word: list[list[float]], gamma: float, clip: float | None) -> None:
    sentence = [sum(row) / len(row) for row in word]
    found = dpgan_returns(
        torch.tensor(word, dtype=torch.float64), torch.tensor(sentence, dtype=torch.float64)[:, None], gamma, clip
    )
    for row, expected in zip(found.tolist(), oracle.returns(word, sentence, gamma, clip), strict=True):
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("core", ["lstm", "transformer"])
def test_a_step_of_the_discriminator_parts_real_from_generated(core: Any) -> None:
    _, judge = models(core)
    real, generated = sentences(32), torch.randint(0, 9, (32, 5), generator=torch.Generator().manual_seed(1))

    def gap() -> float:
        with torch.no_grad():
            return float(judge.reward(real)[1].mean() - judge.reward(generated)[1].mean())

    loss = discriminator_loss(judge, real, generated)
    before = gap()
    assert float(loss.detach()) == pytest.approx(-before, abs=1e-5)
    loss.backward()
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter -= 1e-3 * parameter.grad  # type: ignore[operator]
    assert gap() > before


def test_clip_bounds_the_discriminator() -> None:
    _, judge = models()
    real, generated = sentences(32), torch.randint(0, 9, (32, 5), generator=torch.Generator().manual_seed(1))
    free, bound = judge.reward(real)[0].detach(), judge.reward(generated)[0].detach().mean()
    clip = float(free.median())
    loss = discriminator_loss(judge, real, generated, clip).detach()
    assert float(loss) == pytest.approx(float(bound - free.clamp(max=clip).mean()), abs=1e-5)
    assert float(discriminator_loss(judge, real, generated, 1e-6).detach()) == pytest.approx(float(bound), abs=1e-4)
    for threshold, bounded in ((12.0, True), (None, False)):
        writer, own = models()
        train_dpgan(writer, own, sentences(), config(mle_epochs=0, d_pre_steps=4, d_pre_epochs=8, adversarial_epochs=0,
                                                     d_lr=0.1, clip=threshold))  # fmt: skip
        assert (float(own.reward(sentences())[1].detach().mean()) < 30) is bounded


@pytest.mark.parametrize("core", ["lstm", "gru", "transformer"])
def test_teacher_argmax_takes_the_likeliest_word(core: Any) -> None:
    writer, _ = models(core)
    real = sentences(7)
    ids, logs = generator_sample(writer, real)
    best, places = writer(real).max(2)
    assert torch.equal(ids, places) and torch.equal(logs, best)
    assert logs.requires_grad


def test_other_samples() -> None:
    writer, _ = models()
    real = sentences(7)
    ids, logs = generator_sample(writer, real, "teacher_multinomial", torch.Generator().manual_seed(0))
    torch.testing.assert_close(logs, writer(real).gather(2, ids[..., None])[..., 0])
    assert not torch.equal(ids, writer(real).argmax(2))
    ids, logs = generator_sample(writer, real, "free", torch.Generator().manual_seed(0))
    assert torch.equal(ids, writer.sample(7, torch.Generator().manual_seed(0))[0])
    torch.testing.assert_close(logs, writer.word_log_probs(ids))
    assert logs.requires_grad


def toy() -> tuple[TextGenerator, SurpriseDiscriminator, Tensor]:
    """Three words, sentences of two, and all nine sentences."""
    writer = TextGenerator(3, 4, 4, 2, seed=1)
    judge = SurpriseDiscriminator(3, 4, 4, 2, seed=2)
    with torch.no_grad():
        judge.project.bias += torch.tensor([0.0, 1.5, -1.0])
    return writer.double(), judge.double(), torch.cartesian_prod(torch.arange(3), torch.arange(3))


def gradient(loss: Tensor, writer: TextGenerator) -> Tensor:
    writer.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in writer.parameters() if p.grad is not None])


def test_policy_gradient_is_the_enumerated_one() -> None:
    """Two hundred thousand free samples agree with all nine sentences, weighted by their probabilities, within 3 sigma."""
    writer, judge, every = toy()
    with torch.no_grad():
        returns = dpgan_returns(*judge.reward(every))
        weights = writer.word_log_probs(every).sum(1).exp()
    assert float(weights.sum()) == pytest.approx(1.0)
    each = torch.stack(
        [gradient((-writer.word_log_probs(every[i : i + 1]) * returns[i]).sum(), writer) for i in range(9)]
    )
    exact = weights @ each
    count = 200_000
    ids, logs = generator_sample(
        writer, torch.zeros(count, 2, dtype=torch.long), "free", torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        earned = dpgan_returns(*judge.reward(ids))
    estimated = gradient((-logs * earned).sum() / count, writer)
    deviation = ((weights @ each.square() - exact.square()).clamp_min(0) / count).sqrt()
    assert float(exact.abs().max()) > 20 * float(deviation.max())
    # Three sigma for the largest of many correlated entries would fail by chance: all but 1 in 100 are within.
    off = (estimated - exact).abs() > 3 * deviation + 1e-12
    assert float(off.double().mean()) <= 0.01
    norm = float(((estimated - exact).square().sum() / deviation.square().sum()).sqrt())
    assert norm < 3


def test_future_sums_are_no_unbiased_gradient_of_the_product() -> None:
    """With a constant sentence reward the returns give the gradient of the expected reward; with the product they do not."""
    writer, judge, every = toy()
    with torch.no_grad():
        word, sentence = judge.reward(every)
    logs = writer.word_log_probs(every)
    p = logs.sum(1).exp()
    for whole, equal in ((torch.ones_like(sentence), True), (sentence, False)):
        returns = dpgan_returns(word, whole)
        surrogate = gradient((p.detach()[:, None] * -writer.word_log_probs(every) * returns).sum(), writer)
        expected = gradient(-(writer.word_log_probs(every).sum(1).exp() * (whole[:, 0] * word.sum(1))).sum(), writer)
        assert torch.allclose(surrogate, expected, atol=1e-10) is equal


@pytest.mark.parametrize("core", ["lstm", "gru", "transformer"])
@pytest.mark.parametrize("samples", ["teacher_argmax", "teacher_multinomial", "free"])
def test_training_runs_and_records(core: Any, samples: Any) -> None:
    writer, judge = models(core)
    calls: list[tuple[str, int, int]] = []
    history = train_dpgan(
        writer, judge, sentences(), config(samples=samples, clip=12, mle_weight=0.5, baseline=True, warmup_steps=3),
        evaluate=lambda ids: {"words": float(len(ids.unique()))}, progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert history.reason == "finished"
    phases = [(record.phase, record.epoch) for record in history.records]
    assert phases == [("mle", 1), ("mle", 2), ("discriminator", 1), ("discriminator", 2)] + [
        ("adversarial", epoch) for epoch in range(1, 5)
    ]
    assert calls[-1] == ("adversarial", 4, 4) and len(calls) == 8
    values = history.last("adversarial").values
    assert {"nll_gen", "nll_div", "unique_share", "words", "g_loss", "reward_real", "reward_generated"} <= set(values)
    assert all(math.isfinite(value) for value in values.values())
    assert len(history.column("nll_gen", "mle")) == 2 and math.isnan(history.column("g_loss", "mle")[0])
    assert DPGANHistory.from_data(json.loads(json.dumps(history.to_data()))) == history


def test_likelihood_is_learned() -> None:
    writer, judge = models()
    history = train_dpgan(
        writer, judge, sentences(256), config(mle_epochs=25, adversarial_epochs=0, d_pre_steps=0, g_lr=0.02)
    )
    nll = history.column("nll_gen")
    assert nll[0] > 1.0
    # The only thing that is not certain is the first word, one of four.
    assert math.log(4) / 5 - 0.01 < nll[-1] < math.log(4) / 5 + 0.05


def test_same_seed_same_weights() -> None:
    runs = []
    for seed in (0, 0, 1):
        writer, judge = models()
        train_dpgan(writer, judge, sentences(), config(seed=seed, baseline=True, mle_weight=1.0))
        runs.append(torch.cat([p.flatten() for m in (writer, judge) for p in m.parameters()]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("phase", ["mle", "discriminator", "adversarial"])
def test_a_killed_run_goes_on(phase: str, tmp_path: Path) -> None:
    settings = config(baseline=True, mle_weight=0.5, clip=12.0, warmup_steps=5)
    writer, judge = models()
    whole = train_dpgan(writer, judge, sentences(), settings)
    expected = torch.cat([p.flatten() for m in (writer, judge) for p in m.parameters()])

    def kill(name: str, done: int, total: int) -> None:
        if (name, done) == (phase, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_dpgan(*models(), sentences(), settings, folder=tmp_path, progress=kill)
    writer, judge = models()
    again = train_dpgan(writer, judge, sentences(), settings, folder=tmp_path)
    assert torch.equal(torch.cat([p.flatten() for m in (writer, judge) for p in m.parameters()]), expected)
    assert again == whole
    fresh, other = models(seed=5)
    assert train_dpgan(fresh, other, sentences(), settings, folder=tmp_path) == whole  # nothing is left to do
    assert torch.equal(torch.cat([p.flatten() for m in (fresh, other) for p in m.parameters()]), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpgan-adversarial-4.safetensors", "dpgan.json"]


def test_stopping(tmp_path: Path) -> None:
    def stop(values: Mapping[str, float]) -> str | None:
        return "enough" if values["unique_share"] >= 0 else None

    writer, judge = models()
    history = train_dpgan(writer, judge, sentences(), config(eval_every=2), stop=stop, folder=tmp_path)
    assert history.reason == "stopped after adversarial epoch 2: enough"
    assert train_dpgan(*models(), sentences(), config(eval_every=2), folder=tmp_path).reason == history.reason


def test_a_reward_that_is_not_finite_names_the_epoch() -> None:
    writer, judge = models()
    with torch.no_grad():
        judge.project.bias[3] = math.inf
    with pytest.raises(DivergedError, match="discriminator epoch 1: the judge loss is nan; lower"):
        train_dpgan(writer, judge, sentences(), config())
    with pytest.raises(RuntimeError, match="adversarial epoch 1"):
        train_dpgan(writer, judge, sentences(), config(d_pre_steps=0))
    assert issubclass(DivergedError, LayerwrightError)


def test_bad_input(tmp_path: Path) -> None:
    for changes, message in (
        ({"gamma": 1.5}, "gamma: got 1.5, expected 0 to 1"),
        ({"gamma": math.nan}, "gamma"),
        ({"clip": 0.0}, "clip: got 0.0"),
        ({"batch": 0}, "batch: got 0"),
        ({"g_lr": -1.0}, "g_lr: got -1.0"),
        ({"mle_weight": -0.1}, "mle_weight"),
        ({"samples": "beam"}, "unknown kind of samples 'beam'"),
        ({"d_samples": 3}, "d_samples: got 3"),
        ({"eval_samples": 1}, "eval_samples: got 1"),
    ):
        with pytest.raises(InputError, match=message):
            config(**changes)
    writer, judge = models()
    with pytest.raises(InputError, match="at least 16 sentences"):
        train_dpgan(writer, judge, sentences(5), config())
    with pytest.raises(InputError, match="sentences of 4 positions, expected max_len=5"):
        train_dpgan(writer, judge, sentences()[:, :4], config())
    with pytest.raises(InputError, match="expected 0 to 8"):
        train_dpgan(writer, judge, sentences() + 3, config())
    with pytest.raises(InputError, match="heldout: got sentences of 4 positions"):
        train_dpgan(writer, judge, sentences(), config(), heldout=sentences()[:, :4])
    with pytest.raises(InputError, match=r"gamma: got -0.5"):
        dpgan_returns(torch.ones(2, 3), torch.ones(2, 1), gamma=-0.5)
    with pytest.raises(InputError, match="expected"):
        dpgan_returns(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(InputError, match="no record of the phase"):
        DPGANHistory().last("mle")
    train_dpgan(writer, judge, sentences(), config(), folder=tmp_path)
    with pytest.raises(InputError, match=r"other settings \(g_lr\)"):
        train_dpgan(writer, judge, sentences(), config(g_lr=0.5), folder=tmp_path)
    with pytest.raises(InputError, match=r"other settings \(data\)"):
        train_dpgan(writer, judge, sentences(seed=1), config(), folder=tmp_path)
    with pytest.raises(InputError, match="another form"):
        train_dpgan(*models("gru"), sentences(), config(), folder=tmp_path)
    (tmp_path / "dpgan.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        train_dpgan(writer, judge, sentences(), config(), folder=tmp_path)
