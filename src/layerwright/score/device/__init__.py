"""What every layer of a language model costs on a device with one or two processors over one memory.

- `Processor`, `Device`, `Links`, `Energy`: descriptions, also as YAML; `device(name)` and `devices()` are the presets.
- `LMShape`: the shape of a model; `preset_shape(name)`, or `LMShape.from_config` for a transformers configuration.
- `Stage`, `layer_costs`: operations, bytes and Op/B of every layer in one step of serving.
- `seconds`, `expert_table`, `crossover`, `utilization`, `joules`: the roofline.
- `draw_counts`: tokens of every expert, at random.
"""

from layerwright.score.device.costs import CostRow, CostTable, Stage, Work, layer_costs
from layerwright.score.device.presets import bank_pim, device, devices, duplex, h100
from layerwright.score.device.processors import Device, Energy, Links, Processor
from layerwright.score.device.roofline import crossover, expert_table, joules, seconds, utilization
from layerwright.score.device.routing import draw_counts
from layerwright.score.device.shapes import LMShape, preset_shape, preset_shapes

__all__ = [
    "CostRow",
    "CostTable",
    "Device",
    "Energy",
    "LMShape",
    "Links",
    "Processor",
    "Stage",
    "Work",
    "bank_pim",
    "crossover",
    "device",
    "devices",
    "draw_counts",
    "duplex",
    "expert_table",
    "h100",
    "joules",
    "layer_costs",
    "preset_shape",
    "preset_shapes",
    "seconds",
    "utilization",
]
