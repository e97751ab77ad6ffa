from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from layerwright.core.errors import InputError
from layerwright.nn._llama_attention import turn
from layerwright.studies._passkey import DEFINE, QUERY, RECORD, VALUE, VOCABULARY, dictionary, passkey_prompt
from layerwright.studies._passkey_recall import KEYS, KEYS_PLAIN, LONG, passkey_batch, passkey_recall
from layerwright.studies._recall import recall_llama, recall_memory
from layerwright.studies.focused_transformer import ALONE, FOCUSED, PLAIN, memory_model, recall, run, train_recall
from layerwright.studies.sequence import tiny_llama


def test_records() -> None:
    made = dictionary(5, 8, seed=1)
    assert made.definitions.shape == made.queries.shape == (5, 48)
    told = made.definitions.view(-1, RECORD)
    asked = made.queries.view(-1, RECORD)
    assert bool((told[:, 0] == DEFINE).all() and (asked[:, 0] == QUERY).all() and (told[:, 4] == VALUE).all())
    assert len({tuple(row[1:4]) for row in told.tolist()}) == 40
    for document in range(5):
        known = {tuple(row[1:4]): row[5] for row in told.view(5, 8, RECORD)[document].tolist()}
        for row in asked.view(5, 8, RECORD)[document].tolist():
            assert known[tuple(row[1:4])] == row[5]
    assert made.answers.nonzero().flatten().tolist() == list(range(5, 48, 6))
    assert not torch.equal(told[:, 1:], asked[:, 1:])
    assert torch.equal(dictionary(5, 8, 1).queries, made.queries)
    assert not torch.equal(dictionary(5, 8, 2).queries, made.queries)
    with pytest.raises(InputError, match="records: got 40000"):
        dictionary(5000, 8, 0)


@pytest.mark.parametrize("position", [0.0, 0.4, 1.0])
def test_pass_key(position: float) -> None:
    prompt, answer = passkey_prompt(1000, 4711, position, seed=3)
    assert len(prompt) == 1000
    assert answer == b"4711"
    assert prompt.count(b"4711") == 2
    assert prompt.endswith(b"the pass key is ")
    assert abs(prompt.index(b" the pass key is 4711") / 1000 - position) < 0.12
    with pytest.raises(InputError, match="length: got 20"):
        passkey_prompt(20, 1, 0.5)
    with pytest.raises(InputError, match=r"position: got 1\.5"):
        passkey_prompt(500, 1, 1.5)


def test_contexts_rise_when_the_answers_are_known() -> None:
    handle = memory_model(0)
    from layerwright.studies import focused_transformer as study

    assert train_recall(handle.model, handle, 3, 3, seed=0)[1] is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "KNOWN", 0.0)
        patch.setattr(study, "RECENT", 2)
        shares, switched = train_recall(handle.model, handle, 3, 6, seed=0)
    assert len(shares) == 6
    assert switched == 4  # two steps of few records, two of all with one context
    assert all(0 <= share <= 1 for share in shares)
    assert recall(handle.model, handle, 3, 2, seed=5) == recall(handle.model, handle, 3, 2, seed=5)
    assert handle.held == 0


def test_first_weights_attend_two_places_back_and_match_like_with_like() -> None:
    model = recall_llama(0, 35, 96)
    attention = model.model.layers[0].self_attn
    q, k = (bias.view(1, 4, 1, 16).expand(1, 4, 8, 16) for bias in (attention.q_proj.bias, attention.k_proj.bias))
    cos, sin = model.model.rotary_emb(torch.zeros(1, 8, 64), torch.arange(8)[None])
    scores = turn(q, cos, sin) @ turn(k, cos, sin).transpose(-1, -2)
    assert scores[0, :, 7].argmax(-1).tolist() == [5] * 4
    last = model.model.layers[2].self_attn
    assert torch.equal(last.q_proj.weight, last.k_proj.weight)
    assert torch.equal(last.o_proj.weight, last.v_proj.weight.T)
    temperature = recall_memory(model).memories[0].log_temperature
    assert temperature is not None
    assert temperature.detach().exp().tolist() == pytest.approx([0.1] * 4)


def test_first_weights_find_keys_before_training() -> None:
    hits = []
    for start in (recall_llama, lambda s, v, c: tiny_llama(64, 3, 4, seed=s, vocabulary=v, context=c)):
        model = start(0, VOCABULARY, 96)
        attention = model.model.layers[2].self_attn
        records = dictionary(100, 8, 1)
        seen: list[torch.Tensor] = []
        attention.register_forward_pre_hook(
            lambda _m, _a, kw, seen=seen: seen.append(kw["hidden_states"]), with_kwargs=True
        )
        with torch.no_grad():
            for ids in (records.queries, records.definitions):
                model(input_ids=ids)
            q, k = attention.q_proj(seen[0])[:, 4::RECORD], attention.k_proj(seen[1])[:, 5::RECORD]
        best = (q @ k.transpose(1, 2)).argmax(-1, keepdim=True)
        told, asked = (part.view(100, 8, RECORD)[..., 1:4] for part in (records.definitions, records.queries))
        same = (asked[:, :, None] == told[:, None]).all(-1)
        hits.append(same.gather(2, best).float().mean().item())
    assert hits[0] > 0.4 > 0.25 > hits[1]  # chance is 0.125


def test_pass_key_batches() -> None:
    batch = passkey_batch(3, plain=False, filler=True)
    ids, labels = (batch[name].view(2, 16, LONG // 2) for name in ("input_ids", "labels"))
    texts = [bytes(torch.cat([ids[0, row], ids[1, row]]).tolist()) for row in range(16)]
    assert all(text[:-4].endswith(b"the pass key is ") and text.count(text[-4:]) == 3 for text in texts[::2])
    assert not any(b"pass key" in text or any(48 <= c < 58 for c in text) for text in texts[1::2])
    assert bool((labels[0] == -100).all() and (labels[1, 1::2] == -100).all())
    assert torch.equal(labels[1, ::2, -4:], ids[1, ::2, -4:]) and bool((labels[1, ::2, :-4] == -100).all())
    whole = passkey_batch(3, plain=True, filler=True)["input_ids"]
    assert [bytes(row.tolist()) for row in whole] == texts[::2]


def test_pass_keys_are_scored_as_greedy_decoding_would() -> None:
    handle = recall_memory(recall_llama(0, 256, 2 * LONG))

    class Knows(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, logits_to_keep: int, use_cache: bool) -> object:
            rows = [bytes(row.tolist()) for row in input_ids]
            keys = [text.split(b"pass key is ")[1][:4] for text in rows]
            keys[0] = keys[0][:3] + b"x"  # one digit of the first is wrong
            return SimpleNamespace(logits=one_hot(torch.tensor([list(key) for key in keys]), 256).float())

    assert passkey_recall(Knows(), None, 2 * LONG, 0.5, 4, seed=1) == 0.75
    assert 0 <= passkey_recall(handle.model, handle, 2 * LONG, 0.5, 2, seed=1) < 0.5
    assert handle.held == 0


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "focused-transformer"
    rows = {row["arm"]: row for row in evidence.table}
    assert list(rows) == [ALONE, FOCUSED, PLAIN, KEYS, KEYS_PLAIN]
    assert all(0 <= rows[name]["2x"] <= 1 for name in (KEYS, KEYS_PLAIN))
    for name in (ALONE, FOCUSED, PLAIN):
        row = rows[name]
        assert 0 <= row["accuracy, 4"] <= 1
        assert row["switched"] is None
    assert 0 < rows[ALONE]["r_16"] < 1
    assert "r_16" not in rows[PLAIN]
    assert not evidence.checks[0].holds  # six steps teach nothing, and the study says so
    assert evidence.verdict == "does not hold"
