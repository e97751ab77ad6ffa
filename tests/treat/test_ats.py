from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.studies._vit import build_vit
from layerwright.treat.ats import apply_ats, tokens_to_flops


def pictures(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def peaked(architecture: Any = "vit", depth: int = 4) -> Any:
    """Random weights have nearly even attention; larger queries make it peaked."""
    model: Any = build_vit(architecture, depth=depth, seed=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(12)
    return model


@torch.no_grad()
def logits(model: Any, images: Tensor) -> Tensor:
    out: Tensor = model(pixel_values=images).logits
    return out


@pytest.mark.parametrize("architecture", ["vit", "deit"])
def test_all_tokens_kept_is_the_model_itself(architecture: str) -> None:
    model = peaked(architecture)
    sampled: Any = apply_ats(model, [1, 3], 200_000)
    torch.testing.assert_close(logits(sampled, pictures()), logits(model, pictures()), atol=1e-5, rtol=1e-5)
    assert [counts.tolist() for counts in sampled.last_token_counts] == [[16] * 4] * 2
    assert not hasattr(model, "last_token_counts")
    assert sampled.state_dict().keys() == model.state_dict().keys()
    assert all(a is b for a, b in zip(sampled.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("architecture", ["vit", "deit"])
@pytest.mark.parametrize("cap", [1.0, 5])
def test_an_image_gets_the_same_alone_and_in_a_batch(architecture: str, cap: float) -> None:
    sampled: Any = apply_ats(peaked(architecture), [1, 2], cap)
    images = pictures(6)
    together = logits(sampled, images)
    counts = [each.tolist() for each in sampled.last_token_counts]
    assert max(counts[1]) < 16 and (cap == 5 or len(set(counts[0])) > 1)
    assert all(b <= a <= (16 if cap == 1.0 else 5) for a, b in zip(*counts, strict=True))
    for number, image in enumerate(images):
        torch.testing.assert_close(logits(sampled, image[None])[0], together[number], atol=1e-5, rtol=1e-5)
        assert [each.tolist()[0] for each in sampled.last_token_counts] == [each[number] for each in counts]


def test_against_rows_of_the_full_attention() -> None:
    """One layer by hand: all keys and values, and of the rows those of the sampled tokens."""
    model = peaked(depth=2)
    sampled: Any = apply_ats(model, [1], 6)
    image = pictures(1)
    names = dict(model.named_modules())
    layer: Any = next(m for n, m in names.items() if n.endswith("layers.1"))
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    out = model(pixel_values=image, output_hidden_states=True)
    hook.remove()
    owner, x = layer.attention, seen[0][0]
    normed = layer.layernorm_before(x)
    q, k, v = (
        project(normed).view(17, 4, 12).transpose(0, 1) for project in (owner.q_proj, owner.k_proj, owner.v_proj)
    )
    attention = (q @ k.transpose(1, 2) * 12**-0.5).softmax(-1)
    score = attention[:, 0, 1:].sum(0) * v.transpose(0, 1).flatten(1)[1:].norm(dim=1)
    sums = (score / score.sum()).cumsum(0)
    rows = [0, *sorted({1 + int((sums >= (2 * n - 1) / 12).nonzero()[0]) for n in range(1, 7)})]
    mixed = x[rows] + owner.o_proj((attention[:, rows] @ v).transpose(0, 1).flatten(1))
    expected = mixed + layer.mlp(layer.layernorm_after(mixed))
    found = sampled(pixel_values=image, output_hidden_states=True)
    assert sampled.last_token_counts[0].tolist() == [len(rows) - 1]
    torch.testing.assert_close(found.hidden_states[2][0], expected, atol=1e-5, rtol=1e-5)
    assert out.hidden_states[2].shape[1] == 17


def test_fewer_tokens_go_through_the_linear_layers() -> None:
    sampled: Any = apply_ats(peaked(), [1, 2], 1.0)
    rows: dict[str, int] = {}
    for name, module in sampled.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _m, args, name=name: rows.__setitem__(name, rows.get(name, 0) + args[0][..., 0].numel())
            )
    logits(sampled, pictures(5))
    first, second = (int(counts.sum()) + 5 for counts in sampled.last_token_counts)
    by_layer = [{n.rpartition(".")[2]: r for n, r in rows.items() if f"layers.{layer}." in n} for layer in range(4)]
    assert by_layer[0]["fc1"] == 5 * 17
    assert by_layer[1] == {"q_proj": first + 5, "k_proj": 85, "v_proj": 85, "o_proj": first, "fc1": first, "fc2": first}
    assert by_layer[2]["k_proj"] == first and by_layer[2]["fc2"] == second
    assert by_layer[3] == dict.fromkeys(by_layer[3], second)


def test_gradients_reach_queries_keys_and_values() -> None:
    sampled: Any = apply_ats(peaked(), [1, 2], 6)
    sampled(pixel_values=pictures()).logits.square().sum().backward()
    for name, parameter in sampled.named_parameters():
        if "layers" in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            assert name.endswith("k_proj.bias") or parameter.grad.abs().sum() > 0


def test_bfloat16_modes_and_a_layer_of_one_token() -> None:
    model = peaked().bfloat16()
    for options in ({}, {"mode": "official"}, {"rule": "nearest"}, {"mode": "random"}, {"value_norm": "per_head"}):
        sampled = apply_ats(model, [0, 3], 1, **options)  # type: ignore[arg-type]
        out = logits(sampled, pictures().bfloat16())
        assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_operations() -> None:
    dense = tokens_to_flops([197] * 13, 384)
    assert dense == 12 * (197 * 384**2 * 12 + 2 * 197**2 * 384)
    assert tokens_to_flops([197, 100, 100], 384) == (
        (2 * 197 + 2 * 100 + 8 * 100) * 384**2 + 2 * 197 * 100 * 384 + 197 * 384 + 100 * 12 * 384**2 + 2 * 100**2 * 384
    )
    with pytest.raises(InputError, match="counts"):
        tokens_to_flops([5], 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"layers": [4]}, "numbers from 0 to 3"),
        ({"layers": []}, "layers"),
        ({"layers": [-1]}, "layers"),
        ({"mode": "top"}, "mode"),
        ({"special": 2}, "special: unknown"),
        ({"tokens": 2}, "tokens: unknown"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_ats(peaked(), **options)


def test_bad_batches_are_named() -> None:
    sampled = apply_ats(peaked(), [0, 1])
    with pytest.raises(InputError, match="pixel_values: got an empty batch"):
        logits(sampled, pictures(0))
    with pytest.raises(InputError, match="scores: got values that are NaN"):
        logits(sampled, pictures() * float("nan"))


def test_models_without_class_token_score_by_mean_attention() -> None:
    model = peaked(depth=2)
    with pytest.raises(TypeError, match="score_from='mean_attention'"):
        apply_ats(nn.Sequential(model.vit.layers), [1])
    sampled: Any = apply_ats(model, [1], 6, score_from="mean_attention")
    assert logits(sampled, pictures()).isfinite().all()
    assert int(sampled.last_token_counts[0].max()) <= 6


def test_bad_models_are_named() -> None:
    with pytest.raises(TypeError, match="ViT or DeiT"):
        apply_ats(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(InputError, match="changed already"):
        apply_ats(apply_ats(peaked()))
