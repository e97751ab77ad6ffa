"""Edit a plan and see what changed. Run: ``python examples/edit_plan.py``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import yaml

import layerwright as lw
from layerwright.data import demo_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32)
    a = parser.parse_args()
    model, processor = lw.load("demo:vit")
    calibration = demo_data("demo:vit", processor, samples=a.samples)
    plan = lw.plan(model, calibration, budget="bits=3", recipe="rtn")

    with tempfile.TemporaryDirectory() as folder:
        # The file is meant for an editor; here a script plays the person.
        path = plan.save(Path(folder) / "plan.yaml")
        content = yaml.safe_load(path.read_text())
        first = next(iter(content["layers"]))
        content["layers"][first] = {"quantize": {"bits": 8, "method": "rtn"}, "why": "the first layer stays exact"}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        edited = lw.Plan.load(path)

    for change in plan.diff(edited):
        print(change)
    models = {
        "before": model,
        "planned": lw.apply(model, plan, calibration),
        "edited": lw.apply(model, edited, calibration),
    }
    heldout = demo_data("demo:vit", processor, "heldout", samples=360)
    for name, figures in lw.measure(models, heldout, timing=False).items():
        print(f"{name:8s} accuracy {figures.accuracy:.3f}   loss {figures.loss:.4f}   {figures.bytes:,} bytes")


if __name__ == "__main__":
    main()
