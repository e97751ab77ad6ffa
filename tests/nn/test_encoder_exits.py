from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwright as lw
from layerwright.core.blocks import find_blocks
from layerwright.nn.encoder_exits import MultiExit
from layerwright.nn.exit_head import ExitHead, mean_over_tokens, prediction_entropy
from layerwright.nn.scaled_gradient import scale_gradient
from layerwright.treat.encoder_exits import add_encoder_exits, find_exits, remove_exits
from zoo import ZOO

ENCODERS = ["bert", "roberta", "distilbert", "vit", "deit"]


def bert(blocks: int = 3, seed: int = 0, **settings: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=16,
        num_labels=3,
        initializer_range=0.3,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config).eval()


def batch(samples: int = 6, tokens: int = 9, seed: int = 0, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (samples, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, samples):
            mask[row, tokens - row % (tokens - 2) :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(samples) % 3}


def unlabelled(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in data.items() if key != "labels"}


def test_scaled_gradient_is_an_identity_with_a_scaled_gradient() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.arange(4)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 0.25 * torch.arange(4).float().expand(3, 4))
    assert scale_gradient(x, 1) is x
    assert scale_gradient(x.detach(), 3.0).requires_grad is False
    with pytest.raises(ValueError, match=r"w: got nan"):
        scale_gradient(x, math.nan)
    low = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    scale_gradient(low, 0.5).sum().backward()
    assert low.grad is not None and low.grad.dtype == torch.bfloat16


def _block_outputs(exits: MultiExit, data: dict[str, Tensor], *, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What each block gives before any scaling, and the loss of each exit, in a graph that joins them."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs.append(output)

    handles = [block.register_forward_hook(keep) for block in exits.blocks]
    result = exits(**unlabelled(data))
    for handle in handles:
        handle.remove()
    return outputs, [nn.functional.cross_entropy(logits, labels) for logits in result.exit_logits]


@pytest.mark.parametrize("blocks", [None, "some"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 6])
def test_each_block_receives_the_mean_of_the_gradients_of_the_exits_above(depth: int, blocks: str | None) -> None:
    model = bert(depth).double()
    positions = None if blocks is None else [1, max(1, depth - 1)]
    data = batch(4)
    labels = data["labels"]
    equalized = add_encoder_exits(model, positions, equalize=True)
    plain = add_encoder_exits(model, positions, equalize=False)
    outputs, losses = _block_outputs(equalized, data, labels=labels)
    ours = torch.autograd.grad(torch.stack(losses).sum(), outputs)
    raw, raw_losses = _block_outputs(plain, data, labels=labels)
    assert all(torch.equal(a, b) for a, b in zip(losses, raw_losses, strict=True))
    for j in range(depth):
        above = [e for e, position in enumerate(plain.positions) if position > j]
        single = [
            torch.autograd.grad(raw_losses[e], raw[j], retain_graph=True)[0] for e in above
        ]  # exit by exit, no scaling
        expected = torch.stack(single).sum(0) / len(above)
        assert torch.allclose(ours[j], expected, rtol=1e-9, atol=1e-12)
        if len(above) > 1:
            assert not torch.allclose(ours[j], torch.stack(single).sum(0), rtol=1e-3)


@pytest.mark.parametrize("name", ENCODERS)
def test_last_exit_is_the_model_and_states_are_its_own(name: str) -> None:
    model, batches = ZOO[name]()
    data = unlabelled(batches[0])
    exits = add_encoder_exits(model)
    before = copy.deepcopy(model.state_dict())
    out = exits(**data)
    whole = model(**data, output_hidden_states=True)
    assert torch.equal(out.logits, whole.logits)
    assert len(out.exit_logits) == len(find_blocks(model)[0])
    assert len(out.hidden_states) == len(out.exit_logits) + 1
    for own, other in zip(out.hidden_states[:-1], whole.hidden_states[:-1], strict=True):
        assert torch.equal(own, other)
    assert set(before) == set(model.state_dict())
    assert not any(isinstance(module, ExitHead) for module in model.modules())
    assert torch.equal(exits.model(**data).logits, whole.logits)
    assert exits(**data, labels=batches[0]["labels"]).loss is not None
    assert out.loss is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ENCODERS)
def test_prediction_in_a_batch_is_that_of_each_sample(name: str, attention: str) -> None:
    model, batches = ZOO[name]()
    model.set_attn_implementation(attention)  # type: ignore[operator]
    exits = add_encoder_exits(model, pooling="mean" if attention == "eager" else "cls", seed=1)
    for module in exits.modules():
        if isinstance(module, ExitHead):
            module.classifier.weight.data.mul_(20)
    joined = {key: torch.cat([own[key] for own in batches]) for key in unlabelled(batches[0])}
    if "attention_mask" in joined:
        joined["attention_mask"][::2, -4:] = 0
    entropies = torch.stack([prediction_entropy(logits) for logits in exits(**joined).exit_logits], 1)
    cuts = entropies.flatten().sort().values.tolist()
    thresholds = [(a + b) / 2 for a, b in itertools.pairwise(cuts) if b - a > 1e-3][::2]
    seen = set()
    for threshold in thresholds:
        found = exits.predict(joined, threshold)
        places = (entropies < threshold).int()
        places[:, -1] = 1
        expected = places.argmax(1) + 1
        assert torch.equal(found.exits, expected)
        for row in range(len(expected)):
            one = {key: value[row : row + 1] for key, value in joined.items()}
            single = exits.predict(one, threshold)
            assert (int(single.exits), int(single.labels)) == (int(found.exits[row]), int(found.labels[row]))
        seen |= set(found.exits.tolist())
    assert seen == {1, 2, 3}


def test_blocks_see_only_the_samples_that_are_left() -> None:
    exits = add_encoder_exits(bert(4), seed=2)
    for module in exits.modules():
        if isinstance(module, ExitHead):
            module.classifier.weight.data.mul_(30)
    data = batch(16)
    entropies = torch.stack([prediction_entropy(logits) for logits in exits(**unlabelled(data)).exit_logits], 1)
    threshold = float(entropies[:, :3].detach().median())
    sizes: list[int] = []
    masks: list[int] = []

    def look(_module: nn.Module, args: Any, kwargs: Any) -> None:
        sizes.append(len(args[0]))
        masks.append(len(kwargs["attention_mask"]))

    inner = [block.attention.self for block in exits.blocks]
    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in inner]  # type: ignore[operator, union-attr]
    found = exits.predict(data, threshold)
    for handle in handles:
        handle.remove()
    assert sizes == [int((found.exits > number).sum()) for number in range(4)]
    assert masks == sizes
    assert sizes[0] == 16 > sizes[1] > sizes[-1]
    assert all(len(block._forward_hooks) == len(block._forward_pre_hooks) == 0 for block in exits.blocks)


def test_extreme_thresholds() -> None:
    exits = add_encoder_exits(bert())
    data = batch()
    never, first = exits.predict(data, 0.0), exits.predict(data, math.inf)
    assert never.exits.tolist() == [3] * 6
    assert torch.equal(never.labels, exits.model(**unlabelled(data)).logits.argmax(-1))
    assert first.exits.tolist() == [1] * 6
    assert torch.equal(first.labels, exits(**unlabelled(data)).exit_logits[0].argmax(-1))
    alone = exits.predict(data["input_ids"], 0.0)
    assert torch.equal(alone.labels, exits.model(data["input_ids"]).logits.argmax(-1))


def test_mean_pooling_leaves_padding_out() -> None:
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    expected = torch.stack([states[row][mask[row].bool()].mean(0) for row in range(3)])
    assert torch.allclose(mean_over_tokens(states, mask), expected, atol=1e-6)
    assert mean_over_tokens(states.bfloat16(), mask).dtype == torch.bfloat16
    states[1, 2:] = math.nan
    assert mean_over_tokens(states, mask)[1].isfinite().all()


def test_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0], [30.0, -30.0], [math.log(3.0), 0.0]])
    expected = [math.log(2), 0.0, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    assert prediction_entropy(logits).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"pooling": "mean", "dense": True, "blocks": [2], "equalize": False}])
def test_saved_and_loaded(options: Any, tmp_path: Any) -> None:
    model, batches = ZOO["bert"]()
    exits = add_encoder_exits(model, seed=3, **options)
    lw.save(exits.model, tmp_path / "out")
    loaded = find_exits(lw.load(tmp_path / "out")[0])
    assert loaded is not None
    assert (loaded.positions, loaded.equalize) == (exits.positions, exits.equalize)
    data = unlabelled(batches[0])
    for a, b in zip(exits(**data).exit_logits, loaded(**data).exit_logits, strict=True):
        assert torch.equal(a, b)
    assert find_exits(remove_exits(loaded)) is None
    assert find_exits(exits) is exits


def test_copies_keep_their_exits_apart() -> None:
    exits = add_encoder_exits(bert())
    other = copy.deepcopy(exits)
    for parameter in other.parameters():
        parameter.data.zero_()
    data = unlabelled(batch())
    assert exits(**data).exit_logits[0].any()
    assert not other(**data).exit_logits[0].any()


def test_bfloat16() -> None:
    exits = add_encoder_exits(bert().bfloat16())
    data = batch()
    out = exits(**data)
    assert out.exit_logits[0].dtype == torch.bfloat16
    assert out.loss is not None
    out.loss.backward()
    assert exits.predict(data, 0.5).labels.shape == (6,)


def test_heads_are_those_of_their_seed() -> None:
    model = bert()
    first, again, other = (add_encoder_exits(model, seed=seed) for seed in (0, 0, 1))

    def weight(exits: MultiExit) -> Tensor:
        head = exits.head(1)
        assert head is not None
        return head.classifier.weight

    assert torch.equal(weight(first), weight(again))
    assert not torch.equal(weight(first), weight(other))
    assert float(weight(first).detach().std()) == pytest.approx(0.3, rel=0.3)


@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_bad_thresholds(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        add_encoder_exits(bert()).predict(batch(), threshold)


def test_entropy_needs_classes() -> None:
    for settings in ({"num_labels": 1}, {"problem_type": "multi_label_classification"}):
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **settings
        )
        exits = add_encoder_exits(BertForSequenceClassification(config))
        with pytest.raises(ValueError, match="threshold"):
            exits.predict(batch(), 0.5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "convnext", "swin", "albert", "t5"])
def test_models_without_reachable_hidden_states(name: str) -> None:
    with pytest.raises(TypeError, match="model"):
        add_encoder_exits(ZOO[name]()[0])


def test_other_modules_and_batches() -> None:
    with pytest.raises(TypeError, match="model"):
        add_encoder_exits(nn.Linear(4, 4))
    from transformers import BertForTokenClassification

    tagger = BertForTokenClassification(bert().config)
    with pytest.raises(TypeError, match=r"expected? \(batch, classes\)|need \(batch, classes\)"):
        add_encoder_exits(tagger)(**unlabelled(batch()))
    with pytest.raises(TypeError, match="batch"):
        add_encoder_exits(bert()).predict("text", 0.5)


@pytest.mark.parametrize("options", [{"blocks": [0]}, {"blocks": [4]}, {"blocks": []}, {"pooling": "max"}])
def test_bad_exits(options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options)) if "pooling" in options else "positions"):
        add_encoder_exits(bert(), **options)


def test_gradient_checkpointing_is_refused_in_training() -> None:
    model = bert()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    exits = add_encoder_exits(model)
    exits(**unlabelled(batch()))
    with pytest.raises(ValueError, match="checkpointing"):
        exits.train()(**unlabelled(batch()))
