"""Your own `nn.Module` and your own loss: inspect, plan, apply, measure. Run: ``python examples/own_module.py``."""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

import layerwright as lw


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Regressor(nn.Module):
    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).squeeze(-1)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss that counts: layerwright only ever calls this."""
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(64, 64, generator=generator) for _ in range(count)]
    return [(x, (x[:, :8] * x[:, 8:16]).sum(-1) / 3) for x in inputs]


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for batch in batches(steps, seed=1):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--budget", default="bits=4")
    a = parser.parse_args()
    torch.manual_seed(0)
    model = Regressor()
    train(model, a.steps)

    calibration, heldout = batches(8, seed=2), batches(8, seed=3)
    profile = lw.inspect(model, calibration, loss_fn=loss_fn, scores=["fisher"])
    for row in profile:
        if "fisher" in row.scores:
            print(f"{row.ref.path:16s} {row.cost.bytes:8,.0f} bytes   damage at 3 bits {row.scores['fisher']:.2e}")

    plan = lw.plan(model, calibration, budget=a.budget, recipe="mixed", loss_fn=loss_fn)
    for line in plan.table():
        print(f"{line['layer']:16s} {line['treatment']}")

    before = copy.deepcopy(model.state_dict())
    small = lw.apply(model, plan, calibration, loss_fn=loss_fn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    table = lw.measure({"before": model, "after": small}, lw.Calibration(heldout, loss_fn), timing=False)
    for name, figures in table.items():
        print(f"{name:8s} loss {figures.loss:.5f}   {figures.bytes:,} bytes")


if __name__ == "__main__":
    main()
