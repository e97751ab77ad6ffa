from __future__ import annotations

import math
import textwrap
from types import MappingProxyType

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.cost import Cost
from layerwright.core.errors import PlanError
from layerwright.core.option import Allocation, Option
from layerwright.core.plan import Plan
from layerwright.core.plan_reader import read_plan
from layerwright.core.treatment import Drop, LowRank, Quantize, Sparsify, treatments_from_data

PLAN = Plan(
    layers={
        "model.layers.0.self_attn.q_proj": (Quantize(4, 32, False, "rtn"),),
        "model.layers.0.self_attn.k_proj": (Quantize(8, act_bits=8),),
        "model.layers.0.mlp.down_proj": (Sparsify(0.25, method="wanda"), Quantize(3)),
        "model.layers.0.mlp.up_proj": (LowRank(24),),
        "model.layers.1": (Drop(),),
        "lm_head": (),
    },
    reasons={"model.layers.1": "drop: 1.2e-09 damage per byte saved", "lm_head": "kept: its only option, 0 damage"},
    model={"name": "demo:lm", "fingerprint": "0123", "architecture": "LlamaForCausalLM"},
    budget="bits=4.25",
    recipe="adaquant",
    target="layerwright",
    predicted={"bytes": 12345.0, "damage": 1e-7, "loss": 2.5},
    seed=7,
    notes="first try\n  with two lines",
)
HEAD = "layerwright_plan: 1\n"


def load(tmp_path, text: str) -> Plan:
    path = tmp_path / "plan.yaml"
    path.write_text(textwrap.dedent(text))
    return Plan.load(path)


def refuse(tmp_path, text: str) -> str:
    """The message for a plan with a mistake, without the folder."""
    with pytest.raises(PlanError) as error:
        load(tmp_path, text)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(f"{tmp_path}/", "")


class TestFile:
    def test_round_trip(self, tmp_path):
        path = PLAN.save(tmp_path / "deep" / "plan.yaml")
        again = Plan.load(path)
        assert again == PLAN
        assert list(again.layers) == list(PLAN.layers)
        assert again.source == str(path)
        lines = path.read_text().splitlines()
        assert all(lines[n - 1].startswith(f"  {layer}: ") for layer, n in again.lines.items())
        assert [p.name for p in path.parent.iterdir()] == ["plan.yaml"]

    def test_one_line_per_layer_with_what_differs_from_the_defaults(self):
        text = PLAN.to_yaml()
        wanted = (
            "  model.layers.0.self_attn.q_proj: {quantize: {bits: 4, group_size: 32, symmetric: false, method: rtn}}"
        )
        assert wanted in text.splitlines()
        assert "  model.layers.0.mlp.up_proj: {low_rank: {inner: 24}}" in text.splitlines()
        assert "  lm_head: {keep: {}, why: 'kept: its only option, 0 damage'}" in text.splitlines()
        assert text.startswith("# ")
        assert "You may edit" in text

    def test_it_is_plain_yaml(self):
        data = yaml.safe_load(PLAN.to_yaml())
        assert treatments_from_data(data["layers"]["model.layers.0.mlp.down_proj"]) == (
            Sparsify(0.25, method="wanda"),
            Quantize(3),
        )
        assert data["predicted"]["damage"] == 1e-7

    @settings(max_examples=50, deadline=None)
    @given(
        st.dictionaries(st.text(min_size=1, max_size=30), st.sampled_from(list(PLAN.layers.values())), max_size=5),
        st.text(max_size=40),
        st.text(max_size=200),
        st.dictionaries(st.text(max_size=9), st.floats(allow_nan=False) | st.integers(-(10**15), 10**15), max_size=3),
    )
    def test_any_text_survives(self, layers, name, notes, predicted):
        plan = Plan(layers, dict.fromkeys(layers, notes), {"name": name}, predicted=predicted, notes=notes)
        text = plan.to_yaml()
        assert Plan(**read_plan("p.yaml", text)) == plan
        assert len(text.split("\nlayers:", 1)[1].split("\n")) == (len(layers) or 0) + 2

    def test_an_empty_plan(self, tmp_path):
        plan = Plan({})
        assert Plan.load(plan.save(tmp_path / "p.yaml")) == plan

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = PLAN.save(tmp_path / "p.yaml")
        old = path.read_text()

        def fail(self):
            raise OSError("disk full")

        monkeypatch.setattr(Plan, "to_yaml", fail)
        with pytest.raises(OSError, match="disk full"):
            Plan({}).save(path)
        assert path.read_text() == old
        assert [p.name for p in tmp_path.iterdir()] == ["p.yaml"]

    def test_what_a_person_may_write(self, tmp_path):
        plan = load(
            tmp_path,
            """\
            layerwright_plan: 1
            layers:
              a: keep
              b:
              c: drop
              d: quantize
              e: {keep: {}, why: "no reason"}
              f:
                quantize:
                  bits: 3
                sparsify: {pattern: "2:4"}
                why: two things
              g: {why: left alone}
            """,
        )
        assert plan.layers == {
            "a": (),
            "b": (),
            "c": (Drop(),),
            "d": (Quantize(),),
            "e": (),
            "f": (Sparsify(pattern="2:4"), Quantize(3)),
            "g": (),
        }
        assert plan.reasons == {"e": "no reason", "f": "two things", "g": "left alone"}
        assert plan.lines == {"a": 3, "b": 4, "c": 5, "d": 6, "e": 7, "f": 8, "g": 13}

    def test_many_layers_load_quickly(self, tmp_path):
        layers = {f"model.layers.{i}.mlp.up_proj": (Quantize(4, 32),) for i in range(500)}
        plan = Plan(layers, dict.fromkeys(layers, "int4 g32: 1e-6 damage per byte saved"))
        assert Plan.load(plan.save(tmp_path / "p.yaml")) == plan


class TestMistakes:
    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["  a: keep", "  b: keep", "  a: drop"], "plan.yaml:5: layers: a is given twice (first in line 3)"),
            (
                ["  a: keep", "  b: {quantise: {bits: 4}}"],
                "plan.yaml:4: unknown treatment 'quantise' in b; did you mean",
            ),
            (["  a: {quantize: {bit: 4}}"], "plan.yaml:3: unknown setting of quantize 'bit' in a; did you mean bits"),
            (
                ["  a:", "    quantize:", "      group_size: 32", "      bit: 4"],
                "plan.yaml:6: unknown setting of quantize 'bit'",
            ),
            (
                ["  a:", "    quantize:", "      group_size: 32", "      bits: four"],
                "plan.yaml:6: a: quantize.bits: got 'four', expected int",
            ),
            (
                ["  a:", "    quantize:", "      bits: 12"],
                "plan.yaml:5: a: bits: got 12, expected a whole number from 2",
            ),
            (
                ["  a:", "    quantize:", "      bits: 4", "      method: gtpq"],
                "plan.yaml:6: unknown value 'gtpq' in a: quantize.method; did you mean gptq",
            ),
            (["  a:", "    sparsify: {}", "    quantize: 4"], "plan.yaml:5: a: quantize got 4, expected a mapping"),
            (["  a: {drop: {}, quantize: {}}"], "plan.yaml:3: a: drop + int4 gptq contradict each other"),
            (["  a: {keep: {}, quantize: {}}"], "plan.yaml:3: a: keep stands alone"),
            (["  a: {quantize: {}, quantize: {bits: 3}}"], "plan.yaml:3: a: quantize is given twice"),
            (["  a:", "    quantize: {bits: 3,", "      bits: 4}"], "plan.yaml:5: a: quantize: bits is given twice"),
            (["  a: [quantize]"], "plan.yaml:3: a: got a list, expected a single value"),
            (["  a: {quantize: {bits: [4]}}"], "plan.yaml:3: a: quantize: got a list"),
            (["  a: 4"], "plan.yaml:3: a: got 4, expected a mapping"),
            (["  a: sharpen"], "plan.yaml:3: unknown treatment 'sharpen' in a"),
            (["  a: {why: 3}"], "plan.yaml:3: a: why: got 3, expected text"),
            (["  4: keep"], "plan.yaml:3: layers: got the name 4, expected text"),
            (["  [a, b]: keep"], "plan.yaml:3: layers: got a list"),
            (["  a: &x {quantize: {}}", "  b: *x"], "plan.yaml:3: b: a reference (*name) to something above"),
            (["  a: !!python/object:os.system {}"], "plan.yaml:3: "),
            (["  a: {quantize: !!python/name:os.system ''}"], "plan.yaml:3: a: quantize: "),
            (["  <<: {a: keep}"], "plan.yaml:3: layers: "),
        ],
    )
    def test_in_a_layer(self, tmp_path, lines, message):
        assert message in refuse(tmp_path, "\n".join([*HEAD.splitlines(), "layers:", *lines]))

    def test_all_layers_with_mistakes_are_named(self, tmp_path):
        text = f"{HEAD}layers:\n  a: {{quantize: {{bits: 1}}}}\n  b: keep\n  c: prune\n"
        message = refuse(tmp_path, text)
        assert "plan.yaml:3: a: bits: got 1" in message
        assert "; plan.yaml:5: unknown treatment 'prune' in c" in message

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "plan.yaml:1: the file is empty"),
            ("# only a remark\n", "plan.yaml:1: the file is empty"),
            ("hello", "plan.yaml:1: plan: got 'hello', expected a mapping"),
            ("- a\n- b\n", "plan.yaml:1: plan: got a list"),
            ("layers: {}\n", "layerwright_plan: got None, expected 1"),
            ("layerwright_plan: 2\nlayers: {}\n", "layerwright_plan: got 2, expected 1"),
            (HEAD, "plan.yaml:1: layers: missing"),
            (HEAD + "layers: 3\n", "plan.yaml:2: layers: got '3', expected a mapping"),
            (HEAD + "layers:\n", "plan.yaml:2: layers: got '', expected a mapping"),
            (HEAD + "layer: {}\n", "plan.yaml:2: unknown key 'layer'; did you mean layers"),
            (HEAD + "layers: {}\nseed: one\n", "plan.yaml:3: seed: got 'one', expected a whole number"),
            (HEAD + "layers: {}\nseed: true\n", "plan.yaml:3: seed: got True, expected a whole number"),
            (HEAD + "layers: {}\nbudget: 4.25\n", "plan.yaml:3: budget: got 4.25, expected text"),
            (HEAD + "layers: {}\ntarget: ggfu\n", "plan.yaml:3: unknown target 'ggfu'; did you mean gguf"),
            (
                HEAD + "layers: {}\npredicted:\n  bytes: many\n",
                "plan.yaml:4: predicted.bytes: got 'many', expected a number",
            ),
            (
                HEAD + "layers: {}\nmodel: {print: abc}\n",
                "plan.yaml:3: unknown key 'print' in model; did you mean fingerprint",
            ),
            (HEAD + "layers: {}\nmodel: {name: 3}\n", "plan.yaml:3: model.name: got 3, expected text"),
            (HEAD + "layers: {}\nlayers: {}\n", "plan.yaml:3: plan: layers is given twice (first in line 2)"),
            (HEAD + "layers: {a: keep\n", "not valid YAML"),
            (HEAD + "layers:\n\ta: keep\n", "plan.yaml:3: not valid YAML"),
            (HEAD + "layers: {a: *nothing}\n", "plan.yaml:2: not valid YAML"),
            (HEAD + "layers: {}\n---\nmore: 1\n", "not valid YAML"),
            ("[" * 2000, "plan.yaml:1: not valid YAML: nested too deeply"),
        ],
    )
    def test_in_the_file(self, tmp_path, text, message):
        assert message in refuse(tmp_path, text)

    def test_files_that_cannot_be_read(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: there is no such plan"):
            Plan.load(tmp_path / "nowhere.yaml")
        with pytest.raises(PlanError, match="cannot be read as a text file"):
            Plan.load(tmp_path)
        (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(PlanError, match="cannot be read as a text file"):
            Plan.load(tmp_path / "b.yaml")

    def test_contradictions_in_memory(self):
        with pytest.raises(PlanError, match="a: drop"):
            Plan({"a": (Quantize(), Drop())})
        with pytest.raises(PlanError, match="contradict"):
            Plan({"a": (Quantize(4), Quantize(8))})
        with pytest.raises(PlanError, match="reasons: b has a reason but is not in the plan"):
            Plan({"a": ()}, {"b": "because"})

    def test_the_order_of_treatments_does_not_matter(self):
        assert Plan({"a": (Quantize(), Sparsify())}) == Plan({"a": (Sparsify(), Quantize())})


class TestCheck:
    paths = ("m.0", "m.0.q", "m.0.k", "m.1", "m.1.q", "m.1.k")
    shapes = MappingProxyType({p: (64, 96) for p in paths if p.count(".") == 2})

    def problems(self, layers, **settings):
        target = settings.pop("target", "layerwright")
        return Plan(layers, target=target).check(self.paths, shapes=self.shapes, **settings)

    def test_a_right_plan_has_none(self):
        assert self.problems({"m.0.q": (Quantize(4, 32),), "m.0.k": (), "m.1": (Drop(),)}) == []
        assert PLAN.check(PLAN.layers) == []

    def test_unknown_layers(self):
        (problem,) = self.problems({"m.0.qq": ()})
        assert problem.startswith("unknown layer 'm.0.qq'; did you mean m.0.q")
        many = self.problems({f"x.{i}": () for i in range(30)})
        assert len(many) == 21
        assert many[-1] == "plan: 10 more layers are unknown to this model"

    def test_a_layer_inside_a_dropped_block(self):
        assert self.problems({"m.1": (Drop(),), "m.1.q": (Quantize(4),)}) == [
            "m.1.q gets int4 gptq, but m.1 is dropped"
        ]
        assert self.problems({"m.1": (Drop(),), "m.1.q": ()}) == []

    def test_shapes(self):
        (problem,) = self.problems({"m.0.q": (Quantize(4, 64),)})
        assert problem == "m.0.q: group_size: 64 does not divide the 96 inputs; use a divisor, or -1 per channel"
        (problem,) = self.problems({"m.0.q": (LowRank(64),)})
        assert "rank 64 is not below" in problem
        (problem,) = self.problems({"m.0.q": (LowRank(4), Sparsify())})
        assert "cannot be combined" in problem
        (problem,) = Plan({"a": (Sparsify(pattern="2:4"),)}).check(["a"], shapes={"a": (8, 6)})
        assert problem == "a: pattern: 2:4 does not fit 6 inputs; they must be a multiple of 4"

    def test_the_wrong_kind_of_layer(self):
        assert "it has a weight of its own; name its block" in self.problems({"m.0.q": (Drop(),)})[0]
        assert "it has no weight of its own; name its layers" in self.problems({"m.0": (Quantize(),)})[0]

    def test_another_model(self):
        plan = Plan({}, model={"name": "demo:lm", "fingerprint": "aa"})
        assert plan.check([], "bb") == ["plan: made for demo:lm (aa), not for this model (bb)"]
        assert plan.check([], "aa") == plan.check([], "") == Plan({}).check([], "bb") == []

    def test_the_target(self):
        assert self.problems({"m.0.q": (Quantize(3, 32),)}, target="gguf") == [
            "m.0.q: gguf cannot load 3-bit weights (it loads [4, 8])"
        ]
        assert "unknown target 'ggfu'" in self.problems({"m.0.q": (Quantize(4, 32),)}, target="ggfu")[0]

    def test_fused_roles(self):
        roles = {"m.0.q": "q", "m.0.k": "k", "m.1.q": "q", "m.1.k": "k"}
        same = {"m.0.q": (Quantize(4, 32),), "m.0.k": (Quantize(4, 32),), "m.1.q": (Quantize(8, 32),)}
        (problem,) = self.problems(same, target="vllm", roles=roles)
        assert problem == "vllm fuses these into one matrix, so they must be equal: m.1.q int8 g32 gptq, m.1.k kept"
        assert self.problems(same, target="hf", roles=roles) == []

    def test_lines_of_the_file_are_named(self, tmp_path):
        plan = load(tmp_path, f"{HEAD}target: vllm\nlayers:\n  m.0.q: {{quantize: {{bits: 3}}}}\n  m.9.q: keep\n")
        problems = [p.replace(f"{tmp_path}/", "") for p in plan.check(self.paths, roles={"m.0.q": "q", "m.0.k": "k"})]
        assert problems[0].startswith("plan.yaml:5: unknown layer 'm.9.q'")
        assert problems[1].startswith("plan.yaml:4: m.0.q: vllm cannot load 3-bit")
        assert problems[2].startswith("plan.yaml:4: vllm fuses")


class TestUse:
    def allocation(self) -> Allocation:
        chosen = (
            Option("embed", (Quantize(8),), Cost(bytes=10.0), 0.1, ("embed", "head")),
            Option("b0.q", (), Cost(bytes=20.0), 0.0),
            Option("b1", (Drop(),), Cost(bytes=-2.0), 0.25, ("b1.q", "b1.k")),
        )
        reasons = {p: f"why {p}" for p in ("embed", "head", "b0.q", "b1", "b1.q", "b1.k")}
        return Allocation(chosen, Cost(bytes=28.0, params=5.0), 0.35, reasons, "integer", True)

    def test_from_an_allocation(self, tmp_path):
        plan = Plan.from_allocation(self.allocation(), model={"name": "x"}, budget="bits=4", base_loss=2.0, seed=3)
        assert plan.layers == {"embed": (Quantize(8),), "head": (Quantize(8),), "b0.q": (), "b1": (Drop(),)}
        assert plan.reasons == {p: f"why {p}" for p in plan.layers}
        assert plan.predicted == {"bytes": 28.0, "params": 5.0, "damage": 0.35, "loss": 2.35}
        assert plan.notes == "chosen by integer, proven optimal"
        assert Plan.load(plan.save(tmp_path / "p.yaml")) == plan

    def test_numpy_numbers_become_plain(self, tmp_path):
        import numpy as np

        plan = Plan({}, predicted={"bytes": np.float32(0.5), "n": np.int64(3)})
        assert Plan.load(plan.save(tmp_path / "p.yaml")) == plan

    def test_table(self):
        rows = PLAN.table()
        assert [row["layer"] for row in rows] == list(PLAN.layers)
        assert rows[2] == {
            "layer": "model.layers.0.mlp.down_proj",
            "treatment": "sparse 25% wanda + int3 gptq",
            "why": "",
        }
        assert rows[-1]["why"] == "kept: its only option, 0 damage"

    def test_diff(self):
        other = Plan({**PLAN.layers, "lm_head": (Quantize(8),), "new": (), "newer": (Quantize(2),)})
        changes = PLAN.diff(other)
        assert [str(c) for c in changes] == ["lm_head: kept -> int8 gptq", "newer: kept -> int2 gptq"]
        assert PLAN.diff(PLAN) == []
        back = other.diff(PLAN)
        assert [(c.layer, c.before, c.after) for c in back] == [(c.layer, c.after, c.before) for c in changes]

    def test_llama_quantize_arguments(self):
        names = {
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
        layers = {f"model.layers.11.{name}": (Quantize(4, 32),) for name in names}
        plan = Plan(
            {
                **layers,
                "model.layers.2.mlp.up_proj": (Quantize(8, 32),),
                "model.layers.3.mlp.up_proj": (),
                "model.layers.3.input_layernorm": (),
                "model.embed_tokens": (Quantize(8, 32),),
                "lm_head": (),
            }
        )
        expected = [a for name in names.values() for a in ("--tensor-type", f"blk.11.{name}=q4_0")]
        expected += ["--tensor-type", "blk.2.ffn_up=q8_0", "--tensor-type", "blk.3.ffn_up=f16"]
        expected += ["--token-embedding-type", "q8_0", "--output-tensor-type", "f16"]
        assert plan.llama_quantize_arguments() == expected

    @pytest.mark.parametrize(
        ("path", "treatments"),
        [
            ("model.layers.0.mlp.up_proj", (Quantize(3, 32),)),
            ("model.layers.0.mlp.up_proj", (Quantize(4),)),
            ("model.layers.0.mlp.up_proj", (Quantize(4, 32, False),)),
            ("model.layers.0.mlp.up_proj", (Sparsify(), Quantize(4, 32))),
            ("model.layers.0", (Drop(),)),
            ("transformer.h.0.attn.c_attn", (Quantize(4, 32),)),
        ],
    )
    def test_what_llama_quantize_has_no_type_for(self, path, treatments):
        with pytest.raises(PlanError, match=f"llama-quantize has no type for {path}"):
            Plan({path: treatments}).llama_quantize_arguments()

    def test_predictions_may_be_infinite(self, tmp_path):
        plan = Plan({}, predicted={"loss": math.inf})
        assert Plan.load(plan.save(tmp_path / "p.yaml")) == plan
