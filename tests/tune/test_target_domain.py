"""Training for one voice: terms, gradients, schedules, the tuner."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.data.spoken import SpeechBatch
from layerwright.models.tacotron2 import Tacotron2, TacotronConfig
from layerwright.tune import target_domain
from layerwright.tune._speech_losses import guided_attention_loss, real_steps, speech_losses
from layerwright.tune.target_domain import TDASS, reversal_strength, target_share, tdass, train_target_domain_
from oracles.tdass import penalty

SIZES: dict[str, Any] = {
    "bins": 6, "encoder_dim": 8, "speaker_dim": 4, "prenet_dim": 8, "lstm_dim": 12, "attention_dim": 8,
    "attention_filters": 4, "attention_kernel": 5, "postnet_dim": 8, "frames_per_step": 2,
}  # fmt: skip


def network(**changes: Any) -> Tacotron2:
    return Tacotron2(TacotronConfig(9, **(SIZES | changes)), 3)


def batch(seed: int = 0, speakers: tuple[int, ...] = (1, 0, 2)) -> SpeechBatch:
    draw = torch.Generator().manual_seed(seed)
    text_lengths, mel_lengths = torch.tensor([5, 2, 4]), torch.tensor([7, 11, 4])
    text = torch.randint(1, 10, (3, 5), generator=draw) * (torch.arange(5) < text_lengths[:, None])
    mel = torch.randn(3, 11, 6, generator=draw) * (torch.arange(11) < mel_lengths[:, None])[..., None]
    return SpeechBatch(text, text_lengths, mel, mel_lengths, torch.tensor(speakers))


def gradients(model: TDASS, progress: float = 0.5, **_: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model.loss(batch(), progress, torch.Generator().manual_seed(4))["total"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_losses_are_those_of_real_places() -> None:
    model, given = network(prenet_dropout=0.0).eval(), batch()
    with torch.no_grad():
        said = model(*given)
    terms = speech_losses(said, given, 2)
    errors, stops = [], []
    for k in range(3):
        t = int(given.mel_lengths[k])
        errors.append((said.mel_after[k, :t] - given.mel[k, :t]).square().flatten())
        steps = -(-t // 2)
        wanted = torch.tensor([0.0] * (steps - 1) + [1.0])
        stops.append(F.binary_cross_entropy_with_logits(said.stop_logits[k, :steps], wanted, reduction="none"))
    assert float(terms["mel_after"]) == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)
    assert float(terms["stop"]) == pytest.approx(float(torch.cat(stops).mean()), rel=1e-5)
    # Whatever stands in the padding of the truth changes nothing.
    real = (torch.arange(11) < given.mel_lengths[:, None])[..., None]
    noisy = given._replace(mel=torch.where(real, given.mel, 7.0))
    with torch.no_grad():
        again = speech_losses(model(*noisy), noisy, 2)
    assert all(torch.equal(terms[name], again[name]) for name in terms)
    assert real_steps(torch.tensor([1, 2, 3, 4]), 2).tolist() == [1, 1, 2, 2]


def test_guided_attention_is_the_slow_one() -> None:
    weights = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0))
    text, steps = torch.tensor([5, 3]), torch.tensor([4, 6])
    weights = weights * (torch.arange(5) < text[:, None])[:, None]
    found = guided_attention_loss(weights, text, steps, 0.3)
    assert float(found) == pytest.approx(penalty(weights, [5, 3], [4, 6], 0.3), rel=1e-5)
    straight = torch.eye(6)[None]
    assert float(guided_attention_loss(straight, torch.tensor([6]), torch.tensor([6]))) == 0
    with pytest.raises(ValueError, match="width"):
        guided_attention_loss(weights, text, steps, 0.0)


@pytest.mark.parametrize("placement", ["memory", "decoder"])
def test_without_classifier_or_reversal_gradients_are_the_networks_own(placement: Any) -> None:
    plain = network()
    said = plain(*batch(), torch.Generator().manual_seed(4))
    sum(speech_losses(said, batch(), 2).values()).backward()  # type: ignore[union-attr]
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    off = gradients(TDASS(network(), 0, 1 / 3, weight=0.0, placement=placement))
    still = gradients(TDASS(network(), 0, 1 / 3, weight=0.5, strength=0.0, placement=placement))
    on = gradients(TDASS(network(), 0, 1 / 3, weight=0.5, placement=placement))
    assert not any(name.startswith("classifier") for name in off)
    assert all(bool(still[name].any()) for name in still if name == "classifier.outer.bias")
    for name, gradient in wanted.items():
        assert gradient is not None
        assert torch.equal(off[f"backbone.{name}"], gradient) and torch.equal(still[f"backbone.{name}"], gradient)
    assert any(not torch.equal(on[f"backbone.{name}"], gradient) for name, gradient in wanted.items())


def test_classifier_learns_by_the_ordinary_gradient() -> None:
    """Of the balanced cross-entropy, whatever lambda is."""
    model = TDASS(network(), 0, 0.25, weight=0.5)
    found = gradients(model, progress=0.9)
    model.zero_grad()
    with torch.no_grad():
        said = network().train()(*batch(), torch.Generator().manual_seed(4))
        feature = model.feature(said, batch())
    logits = model.classifier.outer(model.classifier.inner(feature).relu())
    losses = F.cross_entropy(logits, torch.tensor([0, 1, 0]), reduction="none")
    balance = torch.tensor([0.5 / 0.75, 0.5 / 0.25, 0.5 / 0.75])
    (0.5 * (balance * losses).mean()).backward()
    for name, parameter in model.classifier.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(found[f"classifier.{name}"], parameter.grad, atol=1e-6)


def test_voices_are_pushed_by_the_sign_of_their_kind() -> None:
    """A voice's embedding comes in behind the encoder, so each row has the gradient of its own utterance."""

    def push(target: float, non_target: float, strength: float = 1.0) -> Tensor:
        model = TDASS(network(), 0, 1 / 3, weight=0.5, target=target, non_target=non_target, strength=strength)
        return gradients(model)["backbone.speakers.weight"]

    own = push(0.0, 0.0)
    straight, ours = push(1.0, 1.0) - own, push(1.0, -1.0) - own
    assert float(straight.abs().min(1).values.max()) > 1e-5
    assert torch.allclose(ours[0], straight[0], atol=1e-6)
    assert torch.allclose(ours[1:], -straight[1:], atol=1e-6)
    assert torch.allclose(push(1.0, -1.0, 0.5) - own, ours / 2, atol=1e-6)
    assert torch.allclose((push(0.0, -1.0) - own)[0], torch.zeros(4), atol=1e-7)


def test_balance_counts_both_kinds_alike() -> None:
    """Over data of one target utterance in four, weights average 1, and each kind has half of the sum."""
    model = TDASS(network(), 0, 0.25)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.zero_()
    model.requires_grad_(False)
    feature = torch.randn(4, 8)
    loss = model._classifier_loss(feature, torch.tensor([0, 1, 2, 1]), 1.0)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-6)
    only = model._classifier_loss(feature[:1], torch.tensor([0]), 1.0)
    assert float(only) == pytest.approx(2 * math.log(2), rel=1e-6)


def test_feature() -> None:
    given = batch()
    said = network()(*given, torch.Generator().manual_seed(0))
    memory = TDASS(network(), 0, 0.5).feature(said, given)
    states = TDASS(network(), 0, 0.5, placement="decoder").feature(said, given)
    assert memory.shape == (3, 8) and states.shape == (3, 12)
    assert torch.allclose(memory[1], said.memory[1, :2].mean(0), atol=1e-6)
    assert torch.allclose(states[0], said.states[0, :4].mean(0), atol=1e-6)


def test_lambda() -> None:
    assert reversal_strength(0) == 0 and reversal_strength(1) == pytest.approx(0.99991, abs=1e-5)
    assert reversal_strength(0.1) == pytest.approx(2 / (1 + math.exp(-1)) - 1)
    assert reversal_strength(0.5, 0.2) == pytest.approx(0.2 * reversal_strength(0.5))
    assert reversal_strength(-1) == 0 and reversal_strength(2) == reversal_strength(1)


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, Any, float]] = []

    def stand_in(model: nn.Module, items: Any, loss_of: Any, schedule: Any, **rest: Any) -> list[float]:
        for step in range(schedule.steps):
            optimizer = torch.optim.AdamW(model.parameters(), lr=5.0)
            rest["before_step"](optimizer, step)
            group = optimizer.param_groups[0]
            seen.append((group["lr"], group["betas"], group["eps"]))
        assert rest["training"]
        return []

    monkeypatch.setattr(target_domain, "train_", stand_in)
    train_target_domain_(TDASS(network(), 0, 0.5), [batch()], steps=8, learning_rate=1e-2, final_rate=1e-4)
    rates = [rate for rate, _, _ in seen]
    assert rates[:5] == [1e-2] * 5 and rates[6] == pytest.approx(1e-3)
    assert all(later < earlier for earlier, later in pairwise(rates[4:])) and rates[-1] > 1e-4
    assert {rest for _, *rest in map(tuple, seen) for rest in [tuple(rest)]} == {((0.9, 0.999), 1e-6)}


def test_guided_term_falls_to_zero_by_half() -> None:
    model, draw = TDASS(network(), 0, 0.5, guided=2.0, weight=0.0), torch.Generator()
    for progress, factor in ((0.0, 2.0), (0.25, 1.0)):
        terms = model.loss(batch(), progress, draw.manual_seed(0))
        parts = terms["mel_before"] + terms["mel_after"] + terms["stop"]
        assert float(terms["total"].detach()) == pytest.approx(
            float((parts + factor * terms["guided"]).detach()), rel=1e-5
        )
    assert "guided" not in model.loss(batch(), 0.5, draw)


@pytest.mark.parametrize("settings", [{}, {"weight": 0.0}, {"placement": "decoder"}, {"adversary": "speaker"}])
def test_tuner(settings: dict[str, Any]) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [batch(k) for k in range(2)]
    done: list[int] = []

    def tell(_name: str, step: int, _total: int) -> None:
        done.append(step)

    options: dict[str, Any] = {"target_speaker": 0, "steps": 3, "learning_rate": 5e-3, "hidden": 8, "progress": tell}
    trained = tdass(model, batches, **options, **settings)
    assert done == [1, 2, 3] and isinstance(trained, Tacotron2) and trained.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(trained.speakers.weight, model.speakers.weight)
    again = tdass(model, batches, **options, **settings)
    other = tdass(model, batches, **options, **settings, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(trained.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not torch.equal(other.speakers.weight, trained.speakers.weight)


def test_loss_falls_and_bfloat16_trains() -> None:
    model = TDASS(network(), 0, 1 / 3, hidden=8)
    losses = train_target_domain_(model, [batch()], steps=60, learning_rate=2e-2)
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    half = TDASS(network().bfloat16(), 0, 1 / 3, hidden=8).bfloat16()
    given = batch()._replace(mel=batch().mel.bfloat16())
    losses = train_target_domain_(half, [given], steps=12, learning_rate=1e-2)
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tdass(network(), [batch(speakers=(1, 1, 2))], target_speaker=0),
            "target_speaker: no utterance of speaker 0",
        ),
        (lambda: tdass(network(), [batch()], target_speaker=5), "target_speaker"),
        (lambda: tdass(network(), []), "no batches"),
        (lambda: tdass(network(), [{"text": 1}]), "got batches of type dict, expected SpeechBatch"),  # type: ignore[list-item]
        (lambda: tdass(nn.Linear(2, 2), [batch()]), "got Linear, expected a Tacotron2"),
        (lambda: tdass(network(), [batch()], placement="encoder"), "placement"),  # type: ignore[arg-type]
        (lambda: tdass(network(), [batch()], adversary="all"), "adversary"),  # type: ignore[arg-type]
        (lambda: tdass(network(), [batch()], weight=-1.0), "weight=-1"),
        (lambda: tdass(network(), [batch()], final_rate=1.0), "final_rate"),
        (lambda: tdass(network(), [batch()], steps=0), "steps: got 0"),
        (lambda: TDASS(network(), 3, 0.5), "target_speaker: got 3, expected 0 to 2"),
        (lambda: TDASS(network(), 0, 0.0), "share: got 0"),
        (lambda: target_share([batch()], 7), "no utterance of speaker 7"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
