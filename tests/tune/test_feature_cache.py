from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import logits_of
from layerwright.core.errors import InputError
from layerwright.tune.feature_cache import FeatureCache
from layerwright.tune.subtune import subset_copy, subtune
from subtuning_models import bert, mlp, resnet, vit


class Shortcut(nn.Module):
    """A block whose input is read again at the end, a norm that runs twice, and a table that later blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1, 6)
        self.norm = nn.LayerNorm(6)
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.table(torch.zeros(1, dtype=torch.long, device=x.device))
        first = self.a(x)
        second = self.norm(self.b(first + shift))
        third = self.c(second)
        third += shift  # in place
        return self.head(self.norm(self.d(third)) + first)


def inputs(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "bert":
        ids = torch.randint(1, 32, (11, 6), generator=generator)
        mask = torch.ones_like(ids)
        mask[::3, 4:] = 0
        return {"input_ids": ids, "attention_mask": mask}
    if kind in ("mlp", "shortcut"):
        return {
            "x" if kind == "shortcut" else "input": torch.randn(11, 6 if kind == "shortcut" else 8, generator=generator)
        }
    return {"pixel_values" if kind == "vit" else "x": torch.randn(11, 1, 8, 8, generator=generator)}


def shortcut() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Shortcut().eval()


CASES: list[tuple[str, Callable[[], nn.Module], list[str], str]] = [
    ("resnet", resnet, [f"blocks.{n}" for n in range(4)], "head"),
    ("mlp", mlp, [f"0.{n}" for n in range(4)], "2"),
    ("vit", vit, [f"vit.layers.{n}" for n in range(3)], "classifier"),
    ("bert", bert, [f"bert.encoder.layer.{n}" for n in range(3)], "classifier"),
    ("shortcut", shortcut, ["a", "b", "c", "d"], "head"),
]


def runner(kind: str) -> Callable[[nn.Module, Tensor], Any]:
    data = inputs(kind)
    return lambda model, index: model(**{name: value[index] for name, value in data.items()})


def gradients(model: nn.Module, chosen: list[str], head: str, run: Callable[[], Any]) -> dict[str, Tensor]:
    with subtune(model, chosen, head), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        logits_of(run()).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize(("kind", "build", "units", "head"), CASES, ids=[case[0] for case in CASES])
def test_gradients_are_the_same_with_and_without(
    kind: str, build: Callable[[], nn.Module], units: list[str], head: str
) -> None:
    model, run = build(), runner(kind)
    cache = FeatureCache(model, run, 11, batch_size=11)
    whole, some = torch.arange(11), torch.tensor([7, 2, 2, 9])
    for chosen in ([], *([unit] for unit in units), [units[1], units[-1]]):
        prefix = cache.prefix([*chosen, head])
        if chosen[:1] == units[:1] and kind in ("mlp",):
            assert prefix is None
            continue
        assert prefix is not None
        copy = subset_copy(model, chosen)
        for index, exact in ((whole, True), (some, False)):
            plain = gradients(copy, chosen, head, lambda copy=copy, index=index: run(copy, index))
            with prefix.running(copy, index):
                kept = gradients(copy, chosen, head, lambda copy=copy, index=index: run(copy, index))
            assert set(kept) == set(plain) and plain
            for name, gradient in plain.items():
                if exact:
                    assert torch.equal(gradient, kept[name]), name
                torch.testing.assert_close(gradient, kept[name], atol=1e-5, rtol=1e-4)


def test_nothing_of_the_prefix_runs_and_only_its_end_is_kept() -> None:
    model, run = resnet(), runner("resnet")
    cache = FeatureCache(model, run, 11)
    prefix = cache.prefix(["blocks.2", "head"])
    assert prefix is not None
    assert set(prefix.kept) == {"blocks.1"} and set(prefix.skipped) == {"stem", "blocks.0"}
    ran: list[str] = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad(), prefix.running(model, torch.arange(4)):
        run(model, torch.arange(4))
    assert ran and not any(name.startswith(("stem", "blocks.0", "blocks.1")) for name in ran)
    assert cache.prefix(["head", "blocks.2", "blocks.3"]) is prefix
    assert "forward" not in model.blocks[0].__dict__


def test_what_is_read_later_is_kept_too() -> None:
    cache = FeatureCache(shortcut(), runner("shortcut"), 11)
    prefix = cache.prefix(["d"])
    assert prefix is not None and set(prefix.kept) == {"a", "c", "table"} and set(prefix.skipped) == {"b"}
    late = cache.prefix(["c"])  # the norm runs again later, so it runs here too
    assert late is not None and set(late.kept) == {"a", "b", "table"}


def test_memory_is_bounded() -> None:
    model, run = resnet(), runner("resnet")
    size = 11 * 6 * 8 * 8 * 4
    assert FeatureCache(model, run, 11, max_bytes=size - 1).prefix(["blocks.2"]) is None
    cache = FeatureCache(model, run, 11, max_bytes=size)
    one = cache.prefix(["blocks.2"])
    assert one is not None and one.bytes == size
    cache.prefix(["blocks.1"])
    assert cache.prefix(["blocks.2"]) is not one


def test_too_few_samples_and_unknown_paths() -> None:
    model, run = resnet(), runner("resnet")
    assert FeatureCache(model, run, 2).prefix(["blocks.2"]) is None
    with pytest.raises(InputError, match="blocks"):
        FeatureCache(model, run, 11).prefix(["blocks.7"])
    with pytest.raises(InputError, match="samples"):
        FeatureCache(model, run, 0)
