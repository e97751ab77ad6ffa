from __future__ import annotations

import json
import math

import torch

from layerwright.core.evidence import Evidence
from layerwright.studies.evol_q import run


def test_quick_form_measures_every_claim() -> None:
    said: list[tuple[str, int, int]] = []
    state = torch.get_rng_state()
    evidence = run(quick=True, seeds=1, progress=lambda *line: said.append(line))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(evidence, Evidence) and evidence.slug == "evol-q"
    assert [check.name[:3] for check in evidence.checks] == ["(a)", "(a)", "(b)", "(b)", "(b)", "(c)", "(d)"]
    assert all(math.isfinite(check.measured) for check in evidence.checks)
    # What must hold at any size: the fitness falls, and scales are rougher than weights.
    assert evidence.checks[0].holds and evidence.checks[1].holds and evidence.checks[5].holds
    finished = [what for what, done, total in said if done == total]
    assert finished[0] == "training networks 48 wide, 2 deep" and finished[-1] == "evolving scales"
    assert any("48 x 2, W3A8" in note for note in evidence.notes)
    data = json.loads(json.dumps(evidence.to_data()))
    assert {"slug", "claim", "table", "checks", "verdict", "seconds", "seeds", "versions"} <= set(data)
