from __future__ import annotations

import torch

from layerwright.studies.eet import agreement, run, small_llama, steady_allocations
from layerwright.treat.engine import compile_inference


def test_other_weights_do_not_agree() -> None:
    model, other = small_llama(64, 2, 4, 2), small_llama(64, 2, 4, 2, seed=1)
    engine = compile_inference(model, 4, 64)
    assert agreement(model, engine, 8, 8, 0) == 1
    assert agreement(other, engine, 8, 8, 0) == 0
    found = engine.generate(torch.arange(1, 9)[None], None, 24)
    assert len(found.tokens[0, 8:].unique()) > 8  # text that varies


def test_packed_products_are_seen_to_allocate() -> None:
    model = small_llama(256, 2, 8, 8)
    assert steady_allocations(compile_inference(model, 1, 64, layout="plain"), 1)[1] == 0
    assert steady_allocations(compile_inference(model, 1, 64, layout="packed"), 1)[1] >= 4


def test_quick_form() -> None:
    before = torch.get_num_threads()
    evidence = run(quick=True)
    assert evidence.slug == "eet" and torch.get_num_threads() == before
    checks = {check.name: check for check in evidence.checks}
    assert len(checks) == 6
    for name, check in checks.items():
        if "times as fast" not in name:  # a busy machine may blur two rounds
            assert check.holds, name
    speed = next(check for name, check in checks.items() if name.startswith("decoding"))
    assert speed.measured > 1
    rows = [row for row in evidence.table if "batch" in row]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    operations = next(row for row in evidence.table if "operations" in row)
    assert operations["operations"] < operations["theirs"] / 2
