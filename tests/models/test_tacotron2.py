"""Tacotron 2: its sizes, its steps against slow ones, padding, randomness, stopping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layerwright.models._tacotron_attention import LocationSensitiveAttention
from layerwright.models._tacotron_decoder import FusedLSTM
from layerwright.models._tacotron_encoder import MaskedConv, drop, length_mask
from layerwright.models.speaker_classifier import SpeakerClassifier
from layerwright.models.tacotron2 import Tacotron2, TacotronConfig
from oracles.tdass import attention_step, lstm_step

SIZES: dict[str, Any] = {
    "bins": 6, "encoder_dim": 8, "speaker_dim": 4, "prenet_dim": 8, "lstm_dim": 8, "attention_dim": 8,
    "attention_filters": 4, "attention_kernel": 5, "postnet_dim": 8, "frames_per_step": 2,
}  # fmt: skip


def tiny(speakers: int = 3, **changes: Any) -> Tacotron2:
    return Tacotron2(TacotronConfig(9, **(SIZES | changes)), speakers)


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    text_lengths, mel_lengths = torch.tensor([5, 2, 4]), torch.tensor([7, 11, 4])
    text = torch.randint(1, 10, (3, 5), generator=draw) * length_mask(text_lengths, 5)
    mel = torch.randn(3, 11, 6, generator=draw) * length_mask(mel_lengths, 11)[..., None]
    return text, text_lengths, mel.to(dtype), mel_lengths, torch.tensor([0, 2, 1])


def test_parameters_of_the_full_size() -> None:
    """NVIDIA's Tacotron 2 with 148 symbols has 28,193,153; ours differs where it is said to."""
    with torch.device("meta"):
        model = Tacotron2(TacotronConfig(148), 1)
    without = -(3 * 512 + 4 * 512 + 80)  # biases of convolutions, which batch norms take away
    once = -2 * 4 * 1024  # an LSTM step's second bias
    padding, attention_bias = 512, 128
    voices = 64 + (512 + 64) * 512 + 512
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 28_193_153 + without + once + padding + attention_bias + voices


@pytest.mark.parametrize("zoneout", [0.0, 0.2])
def test_lstm_is_the_slow_one(zoneout: float) -> None:
    lstm = FusedLSTM(3, 2, 4, zoneout).eval()
    known, fresh, h, c = (torch.randn(5, n) for n in (3, 2, 4, 4))
    whole = torch.cat((lstm.known.weight, lstm.fresh.weight[:, :2]), 1)
    new_h, new_c = lstm_step(whole, lstm.fresh.weight[:, 2:], lstm.known.bias, torch.cat((known, fresh), 1), h, c)
    with torch.no_grad():
        ours = lstm(lstm.known(known), fresh, (h, c), None)
    assert torch.allclose(ours[0], (1 - zoneout) * new_h + zoneout * h, atol=1e-6)
    assert torch.allclose(ours[1], (1 - zoneout) * new_c + zoneout * c, atol=1e-6)


def test_lstm_is_that_of_torch() -> None:
    lstm, cell = FusedLSTM(3, 2, 4, 0.0), nn.LSTMCell(5, 4)
    order = [0, 1, 3, 2]  # torch: entry, forget, candidate, output
    with torch.no_grad():
        for own, theirs in (
            (lstm.known.weight, cell.weight_ih[:, :3]),
            (lstm.fresh.weight, torch.cat((cell.weight_ih[:, 3:], cell.weight_hh), 1)),
            (lstm.known.bias, cell.bias_ih + cell.bias_hh),
        ):
            own.copy_(torch.cat([theirs.chunk(4)[k] for k in order]))
    known, fresh, h, c = (torch.randn(5, n) for n in (3, 2, 4, 4))
    ours, wanted = lstm(lstm.known(known), fresh, (h, c), None), cell(torch.cat((known, fresh), 1), (h, c))
    assert torch.allclose(ours[0], wanted[0], atol=1e-6) and torch.allclose(ours[1], wanted[1], atol=1e-6)


def test_zoneout_keeps_a_share_of_the_state() -> None:
    lstm = FusedLSTM(3, 2, 400, 0.25).train()
    kept = lstm.kept((1, 6), torch.zeros(1), torch.Generator().manual_seed(0))
    assert kept is not None and kept.shape == (1, 6, 2, 400)
    assert float(kept.mean()) == pytest.approx(0.25, abs=0.03)
    h, c = torch.randn(6, 400), torch.randn(6, 400)
    new_h, new_c = lstm(lstm.known(torch.randn(6, 3)), torch.randn(6, 2), (h, c), kept[0])
    assert torch.equal(new_h == h, kept[0, :, 0].bool()) and torch.equal(new_c == c, kept[0, :, 1].bool())
    assert lstm.eval().kept((1, 6), h, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_slow_one(dtype: torch.dtype) -> None:
    attention = LocationSensitiveAttention(6, 4, 5, 3, 7)
    query, memory, lengths = torch.randn(2, 6), torch.randn(2, 9, 4), torch.tensor([9, 5])
    places = torch.rand(2, 2, 9) * length_mask(lengths, 9)[:, None]
    slow = [
        attention_step(
            attention.score.weight[0], attention.query.weight, attention.memory.weight, attention.location.weight,
            attention.conv.weight, attention.memory.bias, query[k], memory[k, :size], places[k, 0], places[k, 1],
        )
        for k, size in enumerate(lengths.tolist())
    ]  # fmt: skip
    attention.to(dtype)
    query, memory, places = (part.to(dtype) for part in (query, memory, places))
    with torch.no_grad():
        context, weights = attention(
            query, attention.keys(memory), memory, places, attention.place_filter(), length_mask(lengths, 9)
        )
    for k, wanted in enumerate(slow):
        exact = dtype == torch.float32
        assert torch.allclose(weights[k, : len(wanted)].float(), wanted, atol=1e-6 if exact else 0.02)
        assert not weights[k, len(wanted) :].any()
        assert torch.allclose(context[k], weights[k] @ memory[k], atol=1e-6 if exact else 0.05)


def test_statistics_see_no_padding() -> None:
    conv, plain = MaskedConv(3, 4, 3), MaskedConv(3, 4, 3)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(1, 6, 3)
    padded = torch.cat((x, torch.zeros(1, 5, 3)), 1)
    mask = length_mask(torch.tensor([6]), 11)
    long = conv(padded, mask)
    short = plain(x, torch.ones(1, 6, dtype=torch.bool))
    assert torch.allclose(long[:, :6], short, atol=1e-6) and not long[:, 6:].any()
    assert torch.allclose(conv.norm.running_mean, plain.norm.running_mean, atol=1e-6)
    assert torch.allclose(conv.norm.running_var, plain.norm.running_var, atol=1e-6)


def test_drop() -> None:
    x = torch.ones(1000)
    kept = drop(x, 0.25, torch.Generator().manual_seed(0))
    assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=0.05)
    assert set(kept.tolist()) <= {0.0, float(torch.tensor(1.0) / 0.75)} and drop(x, 0.0, None) is x


def test_output() -> None:
    model, given = tiny(), batch()
    text, text_lengths, mel, mel_lengths, _ = given
    said = model(*given, torch.Generator().manual_seed(0))
    assert said.mel_before.shape == said.mel_after.shape == mel.shape
    assert said.stop_logits.shape == (3, 6) and said.alignments.shape == (3, 6, 5)
    assert said.memory.shape == (3, 5, 8) and said.states.shape == (3, 6, 8)
    assert torch.allclose(said.alignments.sum(2), torch.ones(3, 6), atol=1e-6)
    assert not said.alignments.masked_select(~length_mask(text_lengths, 5)[:, None]).any()
    assert not said.memory[~length_mask(text_lengths, 5)].any()
    assert not said.mel_after[~length_mask(mel_lengths, 11)].any() and bool((text == 0).any())
    said.mel_after.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "stop" not in name)


def test_a_padded_batch_is_its_items() -> None:
    model, given = tiny(prenet_dropout=0.0).eval(), batch()
    text, text_lengths, mel, mel_lengths, speaker = given
    with torch.no_grad():
        whole = model(*given)
        for k in range(3):
            n, t = int(text_lengths[k]), int(mel_lengths[k])
            one = model(
                text[k : k + 1, :n], text_lengths[k, None], mel[k : k + 1, :t], mel_lengths[k, None], speaker[k, None]
            )
            steps = one.stop_logits.shape[1]
            assert torch.allclose(whole.mel_after[k, :t], one.mel_after[0], atol=1e-5)
            assert torch.allclose(whole.mel_before[k, :t], one.mel_before[0], atol=1e-5)
            assert torch.allclose(whole.stop_logits[k, :steps], one.stop_logits[0], atol=1e-5)
            assert torch.allclose(whole.alignments[k, :steps, :n], one.alignments[0], atol=1e-5)
            assert torch.allclose(whole.memory[k, :n], one.memory[0], atol=1e-5)


def test_each_step_sees_the_step_before_alone() -> None:
    """The last frame of the step before is heard; frames to come, and others of the step before, are not."""
    model, given = tiny(prenet_dropout=0.0).eval(), batch()
    given = (given[0][:1], given[1][:1], torch.randn(1, 8, 6), torch.tensor([8]), given[4][:1])
    changes = {}
    with torch.no_grad():
        before = model(*given).mel_before
        for frame in range(8):
            mel = given[2].clone()
            mel[0, frame] += 1
            other = model(*given[:2], mel, *given[3:]).mel_before
            changes[frame] = [bool((other[0, t] - before[0, t]).abs().max() > 1e-6) for t in range(8)]
    for frame in (1, 3, 5):
        assert changes[frame] == [t > frame for t in range(8)]
    assert all(not any(changes[frame]) for frame in (0, 2, 4, 6, 7))


def test_by_itself_it_says_what_it_would_with_its_own_words() -> None:
    model = tiny(prenet_dropout=0.0).eval()
    text, text_lengths, _, _, speaker = batch()
    with pytest.warns(UserWarning, match="3 of 3 did not stop within 4 steps"):
        said = model.infer(text, speaker, 4, stop_threshold=1.0)
    assert said.mel.shape == (3, 8, 6) and said.mel_lengths.tolist() == [8] * 3 and not said.stopped.any()
    # The frames in front of the postnet are needed to feed them back: take the postnet away.
    for conv in model.postnet.convs:
        nn.init.zeros_(conv.conv.weight)
    with pytest.warns(UserWarning, match="did not stop"):
        said = model.infer(text, speaker, 4, stop_threshold=1.0)
    with torch.no_grad():
        again = model(text, text_lengths, said.mel, said.mel_lengths, speaker)
    assert torch.allclose(again.mel_before, said.mel, atol=1e-5)
    assert torch.allclose(again.alignments, said.alignments, atol=1e-5)


def test_stopping() -> None:
    model = tiny().eval()
    text, _, _, _, speaker = batch()
    nn.init.zeros_(model.decoder.stop.weight)
    nn.init.constant_(model.decoder.stop.bias, 3.0)
    said = model.infer(text, speaker, 10)
    assert said.mel_lengths.tolist() == [2, 2, 2] and bool(said.stopped.all()) and said.mel.shape[1] == 2
    # Samples that stop at different steps: the mel behind the end is 0.
    nn.init.normal_(model.decoder.stop.weight, std=4.0, generator=torch.Generator().manual_seed(1))
    nn.init.zeros_(model.decoder.stop.bias)
    with torch.no_grad():
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = model.infer(text, speaker, 6, 0.5, torch.Generator().manual_seed(2))
    assert said.mel.shape[1] == int(said.mel_lengths.max())
    assert not said.mel[~length_mask(said.mel_lengths, said.mel.shape[1])].any()


def test_speech_is_random_and_seeded() -> None:
    model = tiny()
    text, _, _, _, speaker = batch()
    nn.init.constant_(model.decoder.stop.bias, -9.0)

    def say(seed: int) -> torch.Tensor:
        with pytest.warns(UserWarning, match="did not stop"):
            return model.infer(text, speaker, 3, generator=torch.Generator().manual_seed(seed)).mel

    assert torch.equal(say(1), say(1)) and not torch.equal(say(1), say(2))
    assert model.training  # the mode is left as it was, though dropout of the prenet alone was on


def test_voices_differ_and_the_encoder_knows_none() -> None:
    model = tiny().eval()
    text, text_lengths, _, _, _ = batch()
    with torch.no_grad():
        a, b = (model.encode(text, text_lengths, torch.full((3,), k)) for k in (0, 1))
        assert not torch.allclose(a, b)
        shift = model.fusion.weight[:, 8:] @ (model.speakers.weight[1] - model.speakers.weight[0])
        assert torch.allclose((b - a)[0, 0], shift, atol=1e-6)


def test_first_weights_hang_on_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b = tiny(), tiny()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    c = Tacotron2(TacotronConfig(9, **SIZES), 3, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(a.fusion.weight, c.fusion.weight)


def test_bfloat16() -> None:
    model, given = tiny().to(torch.bfloat16), batch(dtype=torch.bfloat16)
    said = model(*given, torch.Generator().manual_seed(0))
    assert said.mel_after.dtype == torch.bfloat16
    said.mel_after.float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    exact, half = tiny(prenet_dropout=0.0).eval(), tiny(prenet_dropout=0.0).to(torch.bfloat16).eval()
    with torch.no_grad():
        wide, narrow = exact(*batch()).mel_after, half(*given).mel_after.float()
    assert float((wide - narrow).norm() / wide.norm()) < 0.05


TEXT, LENGTHS, MEL, FRAMES, WHO = batch()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(TEXT, LENGTHS, MEL, FRAMES, torch.tensor([0, 3, 1])), r"speaker: got \[3\], expected 0 to 2"),
        (lambda m: m(TEXT, LENGTHS, MEL, FRAMES, torch.tensor([0])), "speaker: got shape"),
        (lambda m: m(TEXT, LENGTHS, MEL[..., :5], FRAMES, WHO), r"mel: .*frames, 6"),
        (lambda m: m(TEXT, LENGTHS, MEL[:2], FRAMES, WHO), "mel: got shape"),
        (lambda m: m(TEXT, LENGTHS, MEL, FRAMES + 9, WHO), "lengths: got"),
        (lambda m: m(TEXT, torch.tensor([5, 0, 4]), MEL, FRAMES, WHO), "no text may be empty"),
        (lambda m: m(TEXT + 5, LENGTHS, MEL, FRAMES, WHO), r"text: got ids .*expected 1 to 9"),
        (lambda m: m(TEXT.float(), LENGTHS, MEL, FRAMES, WHO), "expected ids"),
        (lambda m: m.infer(TEXT[:, :0], WHO), "expected ids"),
        (lambda m: m.infer(torch.zeros(3, 2, dtype=torch.long), WHO), "no text may be empty"),
        (lambda m: m.infer(TEXT, WHO, 0), "max_steps"),
        (lambda m: m.infer(TEXT, WHO, 3, 1.5), "stop_threshold"),
        (lambda _: TacotronConfig(9, encoder_dim=7), "encoder_dim: got 7, expected an even number"),
        (lambda _: TacotronConfig(9, attention_kernel=4), "attention_kernel: got 4, expected an odd number"),
        (lambda _: TacotronConfig(9, zoneout=1.0), "zoneout: got 1"),
        (lambda _: TacotronConfig(0), "symbols: got 0"),
        (lambda _: Tacotron2(TacotronConfig(9), 0), "num_speakers: got 0"),
        (lambda _: SpeakerClassifier(6, 1), "speakers=1"),
        (lambda _: SpeakerClassifier(6, 2)(torch.zeros(1, 4, 5), torch.tensor([4])), r"mel: .*frames, 6"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny())


def test_speaker_classifier_sees_no_padding() -> None:
    model = SpeakerClassifier(6, 3, 8).eval()
    mel = torch.randn(2, 9, 6)
    with torch.no_grad():
        whole = model(mel, torch.tensor([9, 5]))
        assert torch.allclose(whole[1], model(mel[1:, :5], torch.tensor([5]))[0], atol=1e-5)
    assert model.embed(mel, torch.tensor([9, 5])).shape == (2, 8)
