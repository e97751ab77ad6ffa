"""Every recipe on the demo models at one budget each, against uniform rounding and GPTQ of the same bytes.

``python -m benchmarks.recipes`` prints the table; ``--write docs/recipes_measured.md`` also writes it as a page.
``--recipes mixed,mixllm`` takes some. All rows of one run see the same data; quality is the held-out loss and, for the
image models, accuracy. With ``--peer PYTHON``, the interpreter of an environment that holds llmcompressor, its GPTQ
with four bits is measured on ``demo:lm`` too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from layerwright.core.layers import parameter_bytes
from layerwright.core.treatment import Quantize, Treatments
from layerwright.recipes.bench import Bench, open_bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import Decision, decide, element_bytes, uniform_layers
from layerwright.recipes.measure import measure
from layerwright.treat.apply import apply_plan
from layerwright.tune import TUNERS

ROWS: tuple[tuple[str, str, str], ...] = (
    ("mixed", "demo:lm", "bits=3"),
    ("rtn", "demo:lm", "bits=3"),
    ("joint", "demo:lm", "size=0.25x"),
    ("mixllm", "demo:lm", "bits=4.4"),
    ("fptq", "demo:lm", "bits=4.5"),
    ("edge_llm", "demo:lm", "size=0.3x"),
    ("shortened-llama", "demo:lm", "size=0.8x"),
    ("adaquant", "demo:cnn", "bits=3"),
    ("adaquant_light", "demo:cnn", "bits=3"),
    ("emq", "demo:cnn", "bits=3"),
    ("mixed_td", "demo:cnn", "ms=0.65x"),
    ("mptq_vit", "demo:vit", "bits=4"),
    ("lrp_qvit", "demo:vit", "bits=4"),
    ("evol_q", "demo:vit", "bits=3"),
)
"""Recipe, model, budget."""


def nearest(layers: dict[str, Treatments]) -> dict[str, Treatments]:
    """The same widths, rounded to nearest."""
    return {
        path: tuple(dataclasses.replace(t, method="rtn") if isinstance(t, Quantize) else t for t in own)
        for path, own in layers.items()
    }


def baselines(bench: Bench, decision: Decision) -> dict[str, nn.Module]:
    """Uniform rounding and uniform GPTQ of the same bytes."""
    width = element_bytes(bench, decision.refs)
    bound = min(decision.limits.get("bytes", decision.allocation.cost.bytes), decision.table.original.bytes)
    layers, _ = uniform_layers(decision.refs, bound, decision.table.fixed, decision.recipe.group_size, width)
    plans = {"round to nearest": nearest(layers), "GPTQ": layers}
    return {name: apply_plan(bench.model, plan, bench.calibration)[0] for name, plan in plans.items()}


def row(name: str, model: str, budget: str, seed: int) -> list[str]:
    """One line of the table."""
    bench = open_bench(model)
    begun = time.perf_counter()
    decision = decide(bench, budget, name, seed=seed)
    after, _ = apply_plan(bench.model, decision.plan, bench.calibration)
    chosen = recipe(name)
    if chosen.tuner:
        tuner = TUNERS.get(chosen.tuner)
        after = tuner(after, bench.calibration, teacher=bench.model, seed=seed, **chosen.tuner_settings)
    seconds = time.perf_counter() - begun
    models = {"before": bench.model, "after": after, **baselines(bench, decision)}
    found = measure(models, bench.heldout, byte_tokens=model == "demo:lm", seed=seed, timing=False)

    def quality(which: str) -> str:
        m = found[which]
        return f"{m.loss:.4f}" + (f" ({m.accuracy:.1%})" if m.accuracy is not None else "")

    size = parameter_bytes(after)
    return [
        f"`{name}`",
        f"`{model}`",
        f"`{budget}`",
        quality("before"),
        f"**{quality('after')}**",
        quality("round to nearest"),
        quality("GPTQ"),
        f"{size:,} of {parameter_bytes(bench.model):,}",
        f"{seconds:.0f}",
    ]


def peer_loss(python: str) -> str:
    """Held-out loss of ``demo:lm`` after llmcompressor's GPTQ, 4 bits in groups of 32, on the same data."""
    bench = open_bench("demo:lm")
    with tempfile.TemporaryDirectory() as folder:
        assert bench.source is not None
        torch.save({"calibration": _tokens(bench.calibration), "heldout": _tokens(bench.heldout)}, f"{folder}/data.pt")
        code = _PEER.format(model=str(bench.source.folder), data=f"{folder}/data.pt")
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return f"llmcompressor GPTQ W4 g32 on `demo:lm`: loss {found['loss']:.4f} in {found['seconds']:.0f} s"


def _tokens(calibration: object) -> list[torch.Tensor]:
    return [batch["input_ids"] for batch in calibration]  # type: ignore[attr-defined]


_PEER = """
import json, time, torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    from llmcompressor.modifiers.gptq import GPTQModifier
except ImportError:
    from llmcompressor.modifiers.quantization import GPTQModifier
data = torch.load({data!r}, weights_only=True)
model = AutoModelForCausalLM.from_pretrained({model!r}).eval()
rows = torch.cat(data["calibration"])
weights = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
recipe = GPTQModifier(config_groups=dict(all=dict(targets=["Linear"], weights=weights)), ignore=["lm_head"])
begun = time.perf_counter()
oneshot(model=model, dataset=Dataset.from_dict(dict(input_ids=rows.tolist(), attention_mask=torch.ones_like(rows).tolist())),
        recipe=recipe, processor=AutoTokenizer.from_pretrained({model!r}), max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows))
seconds = time.perf_counter() - begun
total = count = 0
with torch.no_grad():
    for ids in data["heldout"]:
        total += float(model(input_ids=ids, labels=ids).loss) * len(ids)
        count += len(ids)
print(json.dumps(dict(loss=total / count, seconds=seconds)))
"""


def main() -> None:
    """Measure and print; write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", help="names, separated by commas; all by default")
    parser.add_argument("--write", type=Path, help="also write the table as a page")
    parser.add_argument("--peer", help="python of an environment with llmcompressor")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    wanted = set(a.recipes.split(",")) if a.recipes else {name for name, _, _ in ROWS}
    heads = ["recipe", "model", "budget", "before", "after", "uniform, to nearest", "uniform GPTQ", "bytes", "seconds"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    print("\n".join(lines), flush=True)
    for name, model, budget in ROWS:
        if name in wanted:
            lines.append(f"| {' | '.join(row(name, model, budget, a.seed))} |")
            print(lines[-1], flush=True)
    notes = [peer_loss(a.peer)] if a.peer else []
    print("\n".join(notes))
    if a.write:
        about = (
            "# Recipes, measured\n\nWritten by `python -m benchmarks.recipes --write docs/recipes_measured.md`. Held-out"
            " loss (and accuracy) before and after; uniform baselines have the same bytes. `seconds` is the recipe's own"
            " time: scoring, deciding, treating and tuning.\n\n"
        )
        a.write.write_text(about + "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in notes))


if __name__ == "__main__":
    main()
