"""Images in the place of tokens, and training in two steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.models.tiny_vlm import TinyVLM, image_projector, merge_image_features
from layerwright.treat.traverse import find_traversal, traverse
from layerwright.tune._loop import Schedule
from layerwright.tune.two_step import Stage, two_step
from zoo import ZOO


class Patches(nn.Module):
    """Four patches of an 8 x 8 image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 4, stride=4)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).transpose(1, 2)


def tiny() -> tuple[Any, list[Any]]:
    generator = torch.Generator().manual_seed(0)
    llm = traverse(ZOO["llama"]()[0]).model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyVLM(Patches(), image_projector(6, 32), llm, image_token=3)
    ids = torch.randint(4, 96, (2, 10), generator=generator)
    ids[:, 1:5] = 3
    labels = ids.clone()
    labels[:, :8] = -100
    return model.eval(), [
        {"input_ids": ids, "pixel_values": torch.randn(2, 1, 8, 8, generator=generator), "labels": labels}
    ]


def test_features_stand_where_the_placeholders_stood() -> None:
    embeddings, features = torch.zeros(2, 5, 3), torch.arange(12.0).reshape(2, 2, 3) + 1
    mask = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 0, 0, 0]]).bool()
    merged = merge_image_features(embeddings, features, mask)
    for sample in range(2):
        assert torch.equal(merged[sample][mask[sample]], features[sample])
    assert not merged[~mask].any()
    assert torch.equal(
        merge_image_features(embeddings.bfloat16(), features, mask)[mask], features.bfloat16().flatten(0, 1)
    )


def test_placeholders_that_do_not_fit() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    with pytest.raises(ValueError, match="image_mask"):
        merge_image_features(torch.zeros(2, 3, 4), torch.zeros(2, 2, 4), mask)
    with pytest.raises(ValueError, match="image_mask"):
        merge_image_features(torch.zeros(2, 4, 4), torch.zeros(2, 2, 4), mask)


@torch.no_grad()
def test_forward_and_generate() -> None:
    model, batches = tiny()
    ids, images = batches[0]["input_ids"], batches[0]["pixel_values"]
    logits = model(ids, images).logits
    assert torch.equal(logits, model.llm(inputs_embeds=model.embed(ids, images)).logits)
    new = model.generate(ids, images, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(new[:, 0], logits[:, -1].argmax(-1))
    assert not torch.allclose(model(ids, images.flip(0)).logits, logits)


def test_two_steps_train_what_they_name() -> None:
    model, batches = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quick = Schedule(steps=8, learning_rate=1e-2)
    aligned = two_step(model, batches, [Stage(("projector", "mixers"), quick)])
    changed = {name for name, value in aligned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("projector") or "traversal.mixer" in name}
    stages = [
        Stage(("projector", "mixers"), quick),
        Stage(("projector", "mixers", "lora"), quick, 4, ("q_proj", "v_proj")),
    ]
    both = two_step(model, batches, stages)
    assert list(both.state_dict()) == list(before)
    changed = {name for name, value in both.state_dict().items() if not torch.equal(value, before[name])}
    expected = ("projector", "q_proj", "v_proj", "traversal.mixer")
    assert changed == {name for name in before if any(part in name for part in expected)}
    with torch.no_grad():
        losses = [float(network(**batches[0]).loss) for network in (model, aligned, both)]
    assert losses[0] > losses[1] > losses[2]
    traversal = find_traversal(both)
    assert traversal is not None and len(traversal.mixers) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in both.parameters())


def test_bad_stages() -> None:
    model, batches = tiny()
    with pytest.raises(ValueError, match="stages"):
        two_step(model, batches, [])
    with pytest.raises(ValueError, match="train"):
        Stage(())
    with pytest.raises(ValueError, match="'adapter'"):
        two_step(model, batches, [Stage(("adapter",))])
