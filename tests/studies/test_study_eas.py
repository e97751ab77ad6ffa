from __future__ import annotations

import json
import math

import pytest
import torch

from layerwright.allocate.controller import Candidate
from layerwright.core.evidence import Evidence
from layerwright.studies.eas import FAKE_START, fake_rewards, run


def test_quick_form_measures_every_claim() -> None:
    state = torch.get_rng_state()
    evidence = run(quick=True, seeds=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(evidence, Evidence) and evidence.slug == "eas" and len(evidence.checks) == 4
    assert all(math.isfinite(check.measured) for check in evidence.checks)
    # What must hold at any size: inheriting beats first weights, the controller learns.
    assert evidence.checks[0].holds and evidence.checks[2].holds
    assert [check.bound for check in evidence.checks] == [0.03, 0.005, 0.1, 0.03]
    json.dumps(evidence.to_data())


def test_fake_reward() -> None:
    deeper = (*FAKE_START[:1], "conv-8-1", *FAKE_START[1:])
    widest = tuple({"conv-8-3": "conv-24-3", "conv-16-3": "conv-32-3", "fc-16": "fc-48"}.get(w, w) for w in FAKE_START)
    start, thin, wide = fake_rewards([Candidate(FAKE_START), Candidate(deeper), Candidate(widest)])
    assert start == 0 and wide == pytest.approx(1) and -0.05 < thin < 0.05
