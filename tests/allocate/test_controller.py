"""The controller: what it may do, what its decisions weigh, and how it learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerwright.allocate.controller import (
    Baseline,
    Candidate,
    DenseSpace,
    Insertion,
    MetaController,
    PlainSpace,
    Widening,
    load_controller_,
    reward,
    save_controller,
    search,
)
from layerwright.allocate.controller.space import encode
from layerwright.core.errors import CheckpointError, InputError

SPACE = PlainSpace((8, 16, 24), (16, 32), (1, 3, 5), max_blocks=3, max_layers=4)
DENSE = DenseSpace((4, 6, 8), max_blocks=2, max_layers=3)
SPECS = (
    ("conv-8-3", "conv-24-5", "pool", "conv-16-3", "fc-32"),
    ("conv-24-1", "pool", "pool", "fc-16", "fc-32", "fc-16"),
)


def controller(**settings: object) -> MetaController:
    return MetaController(SPACE, **({"steps": 8, "hidden": 6, "embed": 4} | settings))  # type: ignore[arg-type]


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start_loop(c: MetaController, specs: tuple[tuple[str, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder, one word after the other in both directions: states and last hidden states."""
    states, last = [], []
    for spec in specs:
        x = c.embedding(torch.tensor(encode(SPACE.words, spec, 8)[: len(spec)]))
        ways = []
        for suffix, order in (("", range(len(spec))), ("_reverse", reversed(range(len(spec))))):
            w_in, w_h = (getattr(c.encoder, f"weight_{k}_l0{suffix}") for k in ("ih", "hh"))
            bias = getattr(c.encoder, f"bias_ih_l0{suffix}") + getattr(c.encoder, f"bias_hh_l0{suffix}")
            h = cell = torch.zeros(6)
            rows = {}
            for t in order:
                i, f, g, o = (w_in @ x[t] + w_h @ h + bias).chunk(4)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                h = o.sigmoid() * cell.tanh()
                rows[t] = h
            ways.append((torch.stack([rows[t] for t in range(len(spec))]), h))
        states.append(torch.cat([ways[0][0], ways[1][0]], 1))
        last.append(torch.cat([ways[0][1], ways[1][1]]))
    return nn.utils.rnn.pad_sequence(states, batch_first=True), torch.stack(last)


def test_encoder_reads_each_network_to_its_own_end() -> None:
    c = controller(seed=1)
    states, (h, _) = c.encode(SPECS)
    expected, last = start_loop(c, SPECS)
    assert states.shape == (2, 8, 12)
    assert torch.allclose(states[:, :6], expected, atol=1e-6) and not states[:, 6:].any()
    assert torch.allclose(h, last, atol=1e-6)
    alone, _ = c.encode(SPECS[:1])  # padding is no part of a network
    assert torch.allclose(alone[0], states[0], atol=1e-6)


def test_first_weights() -> None:
    c = MetaController(SPACE)
    assert c.embedding.weight.shape == (len(SPACE.words) + 1, 16) and c.encoder.hidden_size == 50
    assert 1.6 < float(c.embedding.weight.detach().abs().max()) <= 3**0.5
    assert c.decoder.hidden_size == 100
    assert c.encoder.bias_ih_l0[50:100].eq(1).all() and c.encoder.bias_hh_l0.eq(0).all()
    other = MetaController(SPACE)
    assert all(torch.equal(a, b) for a, b in zip(c.parameters(), other.parameters(), strict=True))
    assert not torch.equal(c.wider.weight, MetaController(SPACE, seed=1).wider.weight)


def test_masked_widening_has_probability_zero() -> None:
    probability, mask = controller().wider_probabilities(SPECS)
    # Words of the largest size, pools and padding cannot be widened.
    assert mask[0].tolist() == [True, False, False, True] + [False] * 4
    assert mask[1].tolist() == [False, False, False, True, False, True, False, False]
    assert bool((probability[~mask] == 0).all()) and bool((probability[mask] > 0).all())


def test_masked_insertions_have_probability_zero_and_the_others_sum_to_one() -> None:
    c = controller(seed=2)
    for block in (0, 1):
        choices = torch.tensor([[block, 0, 1], [2, 1, 0]])
        found, _, mask = c.deeper_probabilities(SPECS, choices)
        for probability in found:
            assert torch.allclose(probability.sum(1), torch.ones(2))
        blocks, layers, _ = found
        assert (blocks[0] > 0).tolist() == [True, True, False]
        assert (blocks[1] > 0).tolist() == [True, False, True]  # nothing lies between its two pools
        assert (layers[0] > 0).tolist() == [True, True, False, False]
        assert (layers[1] > 0).tolist() == [True, True, True, False]
        assert mask.tolist() == [[True, True, True], [True, True, False]]  # no kernel behind fc


def test_a_network_at_full_length_cannot_be_deepened() -> None:
    c = controller(steps=5)
    made = c.act_deeper(SPECS[:1], drawn())
    assert not made.mask.any() and c.position(SPECS[0], made.choices[0]) is None
    logs, entropy = c.log_probability(made)
    assert float(logs[0].detach()) == 0 and bool(entropy.isfinite())
    assert float(c.update([1.0])) == pytest.approx(0, abs=1e-3)
    assert all(bool(p.isfinite().all()) for p in c.parameters())


def test_log_probability_is_the_product_by_hand() -> None:
    c = controller(seed=3)
    wide = c.act_wider(SPECS, drawn(1))
    deep = c.act_deeper(SPECS, drawn(2))
    probability, mask = c.wider_probabilities(SPECS)
    logs, _ = c.log_probability(wide)
    for row in range(2):
        product = 1.0
        for t in range(8):
            if mask[row, t]:
                p = float(probability[row, t].detach())
                product *= p if wide.choices[row, t] else 1 - p
        assert math.exp(float(logs[row].detach())) == pytest.approx(product, rel=1e-5)
    found, _, _ = c.deeper_probabilities(SPECS, deep.choices)
    logs, _ = c.log_probability(deep)
    for row, spec in enumerate(SPECS):
        product = 1.0
        for step, table in enumerate(found):
            position = c.position(spec, deep.choices[row])
            assert position is not None
            if step < 2 or spec[position].startswith("conv"):
                product *= float(table[row, deep.choices[row, step]].detach())
        assert math.exp(float(logs[row].detach())) == pytest.approx(product, rel=1e-5)


def test_draws_follow_the_probabilities() -> None:
    c = controller(seed=4)
    specs = SPECS[:1] * 3000
    made = c.act_wider(specs, drawn(5))
    probability, mask = c.wider_probabilities(SPECS[:1])
    assert torch.allclose(made.choices.float().mean(0)[mask[0]], probability[0][mask[0]], atol=0.04)
    assert not made.choices[:, ~mask[0]].any()
    deep = c.act_deeper(specs, drawn(6)).choices
    found, _, _ = c.deeper_probabilities(SPECS[:1], deep[:1])
    share = torch.bincount(deep[:, 0], minlength=3) / len(deep)
    assert torch.allclose(share, found[0][0], atol=0.04)


def test_gradient_of_one_layer_is_the_analytic_one() -> None:
    """For p = sigmoid(b), d/db of A log p(a) is A (a - p)."""
    c = controller(entropy=0.0)
    with torch.no_grad():
        c.wider.weight.zero_()
        c.wider.bias.fill_(0.3)
    specs = (("conv-8-3",), ("fc-16",), ("pool", "conv-8-3"))
    made = c.act_wider(specs, drawn(8))
    advantages = [1.5, -0.5, 2.0]
    c.objective(advantages).backward()  # type: ignore[no-untyped-call]
    p = 1 / (1 + math.exp(-0.3))
    chosen = [made.choices[0, 0], made.choices[1, 0], made.choices[2, 1]]
    expected = sum(a * (float(x) - p) for a, x in zip(advantages, chosen, strict=True)) / 3
    assert c.wider.bias.grad is not None
    assert float(c.wider.bias.grad) == pytest.approx(expected, rel=1e-5)


def test_entropy_term_by_hand() -> None:
    c = controller(entropy=1.0)
    wide, deep = c.act_wider(SPECS, drawn(1)), c.act_deeper(SPECS, drawn(2))
    probability, mask = c.wider_probabilities(SPECS)
    rows = []
    for row in range(2):
        free = probability[row][mask[row]].detach().double()
        rows.append(float((-(free * free.log() + (1 - free) * (1 - free).log())).mean()))
    found, _, _ = c.deeper_probabilities(SPECS, deep.choices)
    each = [float(-(p * (p + 1e-10).log()).sum(1).mean().detach()) for p in found]
    expected = (sum(rows) / 2 + sum(each) / 3) / 2
    assert float(c.objective([0.0, 0.0]).detach()) == pytest.approx(expected, rel=1e-5)
    assert wide.kind == "wider"


def test_update_makes_good_decisions_likelier_and_forgets() -> None:
    c = controller(learning_rate=1e-2)
    made = c.act_wider(SPECS, drawn(3))
    before = c.log_probability(made)[0].tolist()
    c.update([1.0, -1.0])
    after = c.log_probability(made)[0].tolist()
    assert after[0] > before[0] and after[1] < before[1]
    with pytest.raises(InputError, match="nothing was decided"):
        c.update([1.0, -1.0])
    c.act_wider(SPECS, drawn(3))
    with pytest.raises(InputError, match="advantages: got 1"):
        c.update([1.0])


# -- words ------------------------------------------------------------------------------------------------------------


def test_words_and_bad_specs() -> None:
    assert len(SPACE.words) == 3 * 3 + 2 + 1
    assert encode(SPACE.words, ["pool", "conv-8-1"], 4) == [12, 1, 0, 0]
    c = controller()
    with pytest.raises(ValueError, match="spec: unknown word 'conv-9-3'"):
        c.act_wider([["conv-9-3"]])
    with pytest.raises(ValueError, match="spec: got 9 words"):
        c.act_deeper([["conv-8-3"] * 9])
    with pytest.raises(ValueError, match="spec: got 0 words"):
        c.act_wider([[]])
    for wrong in ({"filters": (8, 8)}, {"units": ()}, {"kernels": (2,)}, {"filters": (0, 1)}):
        with pytest.raises(ValueError, match="got"):
            PlainSpace(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="growths"):
        DenseSpace((6, 4))
    with pytest.raises(ValueError, match="steps"):
        controller(hidden=0)


def test_how_words_grow() -> None:
    assert SPACE.wider("conv-8-5") == "conv-16-5" and SPACE.wider("fc-16") == "fc-32"
    assert SPACE.inserted(SPECS[0], 3, 5)[3:5] == ["conv-16-3", "conv-16-5"]
    assert SPACE.inserted(SPECS[0], 4, None)[4:] == ["fc-32", "fc-32"]
    assert SPACE.blocks(SPECS[1]) == [[0], [], [3, 4, 5]]
    dense = ["g4", "g8", "t", "g6"]
    assert DENSE.wider("g4") == "g6" and DENSE.growable(dense) == [True, False, False, True]
    assert DENSE.inserted(dense, 1, None) == ["g4", "g8", "g8", "t", "g6"]
    assert DENSE.decisions == (2, 3) and DENSE.blocks(dense) == [[0, 1], [3]]


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_reward() -> None:
    assert reward(0.0) == 0 and reward(0.5) == pytest.approx(1)
    assert reward(1.0) == reward(1 - 1e-6) == pytest.approx(math.tan((1 - 1e-6) * math.pi / 2))
    assert reward(0.95) - reward(0.94) > 5 * (reward(0.75) - reward(0.74))
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="accuracy"):
            reward(wrong)


def test_baseline_takes_the_present_batch_in() -> None:
    baseline = Baseline()
    assert baseline.advantages([1.0, 3.0]) == pytest.approx([1 - 1.9, 3 - 1.9])
    assert baseline.value == pytest.approx(1.9)
    baseline.advantages([4.0])
    assert baseline.value == pytest.approx(1.9 + 0.95 * 2.1)


# -- episodes ---------------------------------------------------------------------------------------------------------


def replay(candidate: Candidate, start: tuple[str, ...], space: PlainSpace | DenseSpace) -> tuple[str, ...]:
    spec = list(start)
    for action in candidate.actions:
        if isinstance(action, Insertion):
            spec = space.inserted(spec, action.position, action.kernel)
        else:
            spec = [space.wider(w) if i in action.positions else w for i, w in enumerate(spec)]
    return tuple(spec)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=10, deadline=None)
def test_actions_lead_to_the_words(seed: int, learn: bool) -> None:
    for space, start in ((SPACE, SPECS[0]), (DENSE, ("g4", "g4", "t", "g6"))):
        c = MetaController(space, steps=7, hidden=4, embed=4, seed=seed)
        for episode in search(
            c, start, lambda cs: [0.5] * len(cs), episodes=2, batch=3, wider=2, deeper=3, seed=seed, learn=learn
        ):
            for candidate in episode.candidates:
                assert replay(candidate, start, space) == candidate.spec and len(candidate.spec) <= 7
                encode(space.words, candidate.spec, 7)


def test_search_gives_the_evaluator_whole_batches_and_can_go_on() -> None:
    def evaluate(candidates: object) -> list[float]:
        return [len(c.spec) / 10 + 0.01 * sum(len(w) for w in c.spec) / 100 for c in candidates]  # type: ignore[attr-defined]

    whole = list(search(controller(), SPECS[0], evaluate, episodes=4, batch=3, wider=1, deeper=2, seed=5))
    c, baseline = controller(), Baseline()
    first = list(search(c, SPECS[0], evaluate, episodes=2, batch=3, wider=1, deeper=2, seed=5, baseline=baseline))
    rest = list(
        search(c, SPECS[0], evaluate, episodes=4, batch=3, wider=1, deeper=2, seed=5, first=2, baseline=baseline)
    )
    assert [*first, *rest] == whole
    assert [e.number for e in whole] == [0, 1, 2, 3] and all(len(e.candidates) == 3 for e in whole)
    json.dumps([e.to_data() for e in whole])


def test_search_bad_input() -> None:
    for wrong in ({"episodes": 0}, {"batch": 0}, {"wider": 0, "deeper": 0}, {"wider": -1}):
        with pytest.raises(InputError, match="expected at least"):
            search(controller(), SPECS[0], lambda cs: [0.5], **({"episodes": 1} | wrong))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown word"):
        search(controller(), ("nothing",), lambda cs: [0.5], episodes=1)


def test_learning_beats_chance() -> None:
    """A reward for wide layers: the controller widens more with time, chance does not."""

    def wide(candidates: object) -> list[float]:
        return [sum("24" in w for w in c.spec) / 3 for c in candidates]  # type: ignore[attr-defined]

    start = ("conv-16-3", "pool", "conv-16-3", "conv-16-3")
    rise = {}
    for learn in (True, False):
        c = MetaController(SPACE, steps=6, learning_rate=1e-2, seed=0)
        episodes = list(
            search(c, start, wide, episodes=30, batch=10, wider=1, deeper=0, seed=1, learn=learn, value=float)
        )
        means = [episode.mean for episode in episodes]
        rise[learn] = sum(means[-5:]) / 5 - sum(means[:5]) / 5
    assert rise[True] > 0.2 and abs(rise[False]) < 0.15


def test_saved_controller_learns_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    one = controller()
    one.act_wider(SPECS, drawn(1))
    one.update([1.0, -1.0])
    two = controller(seed=9)
    load_controller_(two, save_controller(one, tmp_path / "c.safetensors"))
    for c in (one, two):
        c.act_deeper(SPECS, drawn(2))
        c.update([0.5, -1.0])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    with pytest.raises(CheckpointError, match="no controller of this form"):
        load_controller_(controller(hidden=5), tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="no controller"):
        load_controller_(controller(), tmp_path / "none.safetensors")


def test_widening_is_a_value() -> None:
    assert Widening((1, 2)) == Widening((1, 2))
    assert Candidate(("a", "b")).key == "a_b"
