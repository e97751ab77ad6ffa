"""Second-order damages scaled by measured ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError
from layerwright.core.layers import treatable
from layerwright.core.option import Scores
from layerwright.core.treatment import LowRank, Quantize, Sparsify, Treatments
from layerwright.score import Subject, anchored_fisher, fisher, snr
from layerwright.score.anchors import rescale
from layerwright.treat.probe import treat_weights
from zoo import ZOO

BITS: tuple[Treatments, ...] = tuple((Quantize(bits),) for bits in (2, 3, 4, 8))
MIXED: Treatments = (Sparsify(0.5), Quantize(4))


@given(st.floats(0.5, 50.0), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_a_constant_factor_is_found_exactly(factor: float, anchors: int) -> None:
    predicted = {treatments: 4.0**-i for i, treatments in enumerate(BITS)}
    found = rescale(predicted, lambda t: factor * predicted[t], anchors=anchors)
    assert found == pytest.approx({t: factor * value for t, value in predicted.items()})


def test_anchors_are_met_and_a_power_law_lies_between() -> None:
    predicted = dict(zip(BITS, (1.0, 0.1, 0.01, 0.001), strict=True))
    truth = {t: 3 * value**1.3 for t, value in predicted.items()}
    asked: list[Treatments] = []

    def measure(treatments: Treatments) -> float:
        asked.append(treatments)
        return truth[treatments]

    found = rescale(predicted, measure, anchors=2)
    assert asked == list(BITS[:2])
    assert found[BITS[0]] == pytest.approx(truth[BITS[0]])
    assert found[BITS[1]] == pytest.approx(truth[BITS[1]])
    assert found[BITS[2]] / predicted[BITS[2]] == pytest.approx(truth[BITS[1]] / predicted[BITS[1]])
    half = {**predicted, (Quantize(5),): math.sqrt(0.1)}
    assert rescale(half, lambda t: 3 * half[t] ** 1.3)[(Quantize(5),)] == pytest.approx(3 * 0.1**0.65)


def test_kinds_have_factors_of_their_own_and_the_floor_is_taken_off() -> None:
    predicted = {BITS[0]: 1.0, BITS[1]: 0.1, MIXED: 1.0, (LowRank(2),): 0.0}
    truth = {BITS[0]: 2.5, BITS[1]: 0.7, MIXED: 9.5}
    found = rescale(predicted, lambda t: truth[t], floor=0.5, anchors=1)
    assert found == pytest.approx({BITS[0]: 2.0, BITS[1]: 0.2, MIXED: 9.0, (LowRank(2),): 0.0})


def test_what_reads_as_noise_is_neither_measured_nor_believed() -> None:
    predicted = {BITS[0]: 1e-4, BITS[1]: 1e-5}
    asked: list[Treatments] = []

    def measure(treatments: Treatments) -> float:
        asked.append(treatments)
        return 0.0

    assert rescale(predicted, measure, floor=1e-3)[BITS[0]] == pytest.approx(0.25e-4)
    assert asked == [BITS[0]]
    with pytest.raises(InputError, match="at least 1"):
        rescale(predicted, measure, anchors=0)


def _subject(name: str) -> Subject:
    model, batches = ZOO[name]()
    refs = treatable(model)
    options: tuple[Treatments, ...] = (*((Quantize(b, method="rtn"),) for b in (2, 4, 8)), (LowRank(2, method="svd"),))
    return Subject(model, Calibration(batches), refs, {r.path: options for r in refs}, treat=treat_weights)


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_the_strongest_treatment_of_a_kind_has_its_measured_damage(name: str, tmp_path) -> None:
    subject = _subject(name)
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    scores = anchored_fisher(subject, terms=10**6)
    plain = fisher(subject)
    assert scores.damages.keys() == plain.damages.keys()
    assert all(math.isfinite(value) and value >= 0 for value in scores.damages.values())
    assert any(scores.damages[key] != plain.damages[key] for key in plain.damages)
    assert scores.data == subject.calibration.fingerprint()
    assert scores.meta["measured_by"] == "divergence"
    assert scores.meta["measured"] <= len(subject.layers) * 5
    assert Scores.load(scores.save(tmp_path)) == scores
    assert all(torch.equal(value, before[key]) for key, value in subject.model.state_dict().items())
    assert anchored_fisher(subject, terms=10**6).damages == scores.damages


def test_scores_say_whether_they_are_rises_of_the_loss() -> None:
    subject = _subject("llama")
    assert fisher(subject).meta["loss_units"] is True
    assert snr(subject).meta["loss_units"] is False
