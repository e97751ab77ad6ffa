"""The training script's saved state: a run that is taken up goes on as if it had not stopped."""

from __future__ import annotations

from pathlib import Path

import torch

from layerwright.data.demo.train_lm import load_state, save_state


def _parts() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.Generator]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1), torch.Generator().manual_seed(3)


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    model(torch.randn(8, 4, generator=generator)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_a_resumed_run_ends_like_a_straight_one(tmp_path: Path) -> None:
    straight = _parts()
    for _ in range(4):
        _step(*straight)
    first = _parts()
    for _ in range(2):
        _step(*first)
    save_state(tmp_path / "state.safetensors", *first, 2)
    second = _parts()
    assert load_state(tmp_path / "state.safetensors", *second) == 2
    for _ in range(2):
        _step(*second)
    for a, b in zip(straight[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
