from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.allocate import keep_blocks, one_shot, uniform
from layerwright.core.cost import Cost
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.option import Option, OptionTable, Scores
from layerwright.core.treatment import Drop, Quantize


def blocks(damages: list[float], tail: float = -1.0) -> OptionTable:
    rows = []
    for b, damage in enumerate(damages):
        covers = (f"b{b}.q", f"b{b}.k")
        rows += [Option(path, (), Cost(bytes=10.0), 0.0) for path in covers]
        rows += [Option(path, (Quantize(8),), Cost(bytes=5.0), 0.01) for path in covers]
        rows.append(Option(f"b{b}", (Drop(),), Cost(bytes=tail), damage, covers))
    return OptionTable(tuple(rows), Cost(bytes=20.0), Cost(bytes=20.0 + 20.0 * len(damages)))


class TestUniform:
    def table(self) -> OptionTable:
        rows = []
        for name, forms in (("a", (8, 4, 2)), ("b", (8, 4)), ("norm", ())):
            rows.append(Option(name, (), Cost(bytes=16.0), 0.0))
            rows += [Option(name, (Quantize(b),), Cost(bytes=float(b)), 4.0**-b) for b in forms]
        return OptionTable(tuple(rows), original=Cost(bytes=48.0))

    @pytest.mark.parametrize(("limit", "bits"), [(48, None), (47, 8), (32, 8), (31, 4), (24, 4)])
    def test_the_best_single_treatment_that_fits(self, limit, bits):
        found = uniform(self.table(), {"bytes": limit})
        given_ = {o.layer: o.treatments for o in found.chosen}
        wanted = () if bits is None else (Quantize(bits),)
        assert given_ == {"a": wanted, "b": wanted, "norm": ()}

    def test_a_layer_without_it_is_left_alone(self):
        # 2 bits exist for one layer only: 2 + 16 + 16 bytes.
        rows = tuple(o for o in self.table().options if o.treatments in ((), (Quantize(2),)))
        found = uniform(OptionTable(rows), {"bytes": 34.0})
        assert [o.treatments for o in found.chosen] == [(Quantize(2),), (), ()]

    def test_out_of_reach_says_the_smallest(self):
        with pytest.raises(BudgetError, match=r"the smallest, int4 gptq, takes 24 bytes \(0\.5x"):
            uniform(self.table(), {"bytes": 23.0})

    def test_no_block_is_dropped(self):
        assert all(o.treatments == () for o in uniform(blocks([0.0, 0.0]), {}).chosen)


class TestOneShot:
    @pytest.mark.parametrize(("limit", "gone"), [(120, []), (119, [3]), (98, [1, 3]), (78, [1, 3]), (57, [0, 1, 3])])
    def test_the_least_damaging_blocks_go_until_it_fits(self, limit, gone):
        found = one_shot(blocks([0.4, 0.2, 0.5, 0.1, 0.9]), {"bytes": limit}, protect_first=0, protect_last=0)
        assert [int(o.layer[1:]) for o in found.chosen if o.treatments == (Drop(),)] == gone
        assert all(o.treatments in ((), (Drop(),)) for o in found.chosen)
        assert found.cost.bytes == 120 - 21 * len(gone)

    def test_protected_ends_stay(self):
        found = one_shot(blocks([0.1, 0.5, 0.4, 0.2]), {"bytes": 79.0}, protect_first=1, protect_last=1)
        assert [o.layer for o in found.chosen if o.treatments == (Drop(),)] == ["b2"]

    def test_out_of_reach_says_what_all_of_them_leave(self):
        with pytest.raises(BudgetError, match=r"all 2 unprotected blocks of 4 leaves bytes 58 bytes \(0\.58x"):
            one_shot(blocks([0.1] * 4), {"bytes": 50.0}, protect_first=1, protect_last=1)

    def test_too_few_blocks(self):
        with pytest.raises(InputError, match="4 and 2 of 6 blocks leave none"):
            one_shot(blocks([0.1] * 6), {"bytes": 50.0})
        with pytest.raises(InputError, match="no option drops a block"):
            one_shot(OptionTable((Option("a", (), Cost(), 0.0),)), {})

    def test_a_block_without_another_option(self):
        table = OptionTable((Option("b", (Drop(),), Cost(), 0.1, ("b.q",)),))
        with pytest.raises(InputError, match="no option but a dropped block's"):
            one_shot(table, {}, protect_first=0, protect_last=0)


class TestKeepBlocks:
    def test_the_lowest_go_and_the_ends_stay(self):
        scores = [0.0, 9.0, 3.0, 1.0, 2.0, 8.0, 0.0, 0.0]
        assert keep_blocks(scores, 2, protect_first=1, protect_last=2) == [0, 1, 2, 5, 6, 7]
        assert keep_blocks(scores, 2, protect_first=0, protect_last=0) == [1, 2, 3, 4, 5, 7]

    def test_published_counts(self):
        assert len(keep_blocks(range(32), ratio=0.2)) == 26
        assert len(keep_blocks(range(40), ratio=0.2)) == 32
        assert keep_blocks([5.0] * 32, 3)[:6] == [0, 1, 2, 3, 7, 8]

    def test_scores_and_mappings(self):
        values = {"b0": 3.0, "b1": 1.0, "b2": 2.0}
        kept = keep_blocks(Scores("ppl", sensitivities=values), 1, protect_first=0, protect_last=0)
        assert kept == keep_blocks(values, 1, protect_first=0, protect_last=0) == [0, 2]

    @given(st.lists(st.floats(0, 1) | st.just(math.inf), min_size=3, max_size=12), st.data())
    def test_no_removed_block_scores_higher_than_a_kept_unprotected_one(self, scores, data):
        first = data.draw(st.integers(0, 1))
        number = data.draw(st.integers(0, len(scores) - first - 2))
        kept = keep_blocks(scores, number, protect_first=first, protect_last=1)
        assert len(kept) == len(scores) - number
        assert set(range(first)) | {len(scores) - 1} <= set(kept)
        inner = [i for i in kept if first <= i < len(scores) - 1]
        removed = [i for i in range(len(scores)) if i not in kept]
        if inner and removed:
            assert max((scores[i], i) for i in removed) < min((scores[i], i) for i in inner)

    @pytest.mark.parametrize("number", [-1, 2, 8])
    def test_too_many_says_how_many(self, number):
        with pytest.raises(InputError, match=r"num_remove: got .* of 8 blocks, expected 0 to 1"):
            keep_blocks([1.0] * 8, number)

    @pytest.mark.parametrize("ratio", [0.0, 1.0, -0.2, 1.5, math.nan])
    def test_ratio_out_of_range(self, ratio):
        with pytest.raises(InputError, match="ratio: got"):
            keep_blocks([1.0] * 32, ratio=ratio)

    def test_other_bad_input(self):
        with pytest.raises(InputError, match="less than one"):
            keep_blocks([1.0] * 8, ratio=0.1)
        with pytest.raises(InputError, match="either num_remove or ratio"):
            keep_blocks([1.0] * 8, 1, 0.5)
        with pytest.raises(InputError, match="either num_remove or ratio"):
            keep_blocks([1.0] * 8)
        with pytest.raises(InputError, match="block 1 is not a number"):
            keep_blocks([1.0, math.nan], 1)
        with pytest.raises(InputError, match="there are none"):
            keep_blocks([], 1)
        with pytest.raises(InputError, match="expected 0 or more"):
            keep_blocks([1.0] * 8, 1, protect_first=-1)
