"""From options and a budget to a choice: one option for every layer, so that the damage is least and the limits hold.

- `ALLOCATORS`: all allocators by name; each is ``(table, limits, *, seed=0, **settings) -> Allocation``.
- `integer`: exact, by an integer program. `lagrangian`, `greedy`: fast and nearly exact. `evolution`: for damages that
  do not add up. `clusters`: similar layers share a treatment. `uniform`, `one_shot`: baselines.
- `global_rows`: widths for the output rows of all layers together. `fptq_strategy`: how each input is rounded.
- `greedy_descent`: step by step down, by measuring.
- `greedy_blocks`: which blocks to train, one after the other, by measuring. `SubsetEvaluations`: remembered, in several
  processes.
- `kv_budgets`: tokens of key-value cache for each layer (in `layerwright.allocate.kv_budgets`).
- `keep_blocks`: which blocks stay when the lowest-ranked ones go.
- `pareto`: the trade-off between a resource and the damage. `minimum`: the smallest reachable total.
- `merge_ties`, `filter_target`: tables for tied layers and for a program that must load the result.
- `width_schedule`: heads, neurons and rank on the way to a narrower encoder.
- `search_subnets`: sub-networks of a supernet for each size, by evolution.
- `depth_width_plan`: over how many layers a number of heads is shared out.
- `equal_parameter_shapes`, `equal_flops_shapes`, `Shape`, `shape_of`: depths and widths of one cost; `DepthWidthAllocator`, `compare_with_best`: which to take (Bamboo).
- `linear_channels`, `stagewise_channels`, `fit_channels_to_budget`, `search_channels`: widths of a convolutional network by block, at a cost (ReXNet).
- `optimal_mixer_sizes`, `mixer_connections`, `effective_width`: tokens and channels of a mixing layer.
"""

from __future__ import annotations

from collections.abc import Callable

from layerwright.allocate.activation_strategy import fptq_strategy
from layerwright.allocate.aspect import AspectCost, depth_width_plan
from layerwright.allocate.channel_schedule import (
    divisible,
    fit_channels_to_budget,
    linear_channels,
    sloped_channels,
    stagewise_channels,
)
from layerwright.allocate.channel_search import ChannelDesign, ChannelSpace, mean_profile, search_channels
from layerwright.allocate.clustering import clusters
from layerwright.allocate.depth_width import Comparison, DepthWidthAllocator, DepthWidthPlan, compare_with_best
from layerwright.allocate.descent import greedy
from layerwright.allocate.equal_parameters import Shape, equal_flops_shapes, equal_parameter_shapes, shape_of
from layerwright.allocate.exact import integer
from layerwright.allocate.frontier import pareto
from layerwright.allocate.global_rows import global_rows
from layerwright.allocate.greedy_blocks import BlockChoice, greedy_blocks
from layerwright.allocate.measured_descent import greedy_descent
from layerwright.allocate.mixer_sizes import effective_width, mixer_connections, optimal_mixer_sizes
from layerwright.allocate.multipliers import lagrangian
from layerwright.allocate.population import evolution
from layerwright.allocate.problem import minimum
from layerwright.allocate.ranking import keep_blocks, one_shot, uniform
from layerwright.allocate.subnet_search import FoundSubnet, search_subnets
from layerwright.allocate.subset_evaluations import SubsetEvaluations
from layerwright.allocate.ties import filter_target, merge_ties
from layerwright.allocate.width_schedule import Widths, proportional_widths, width_schedule
from layerwright.core.option import Allocation
from layerwright.core.registry import Registry

__all__ = [
    "ALLOCATORS",
    "AspectCost",
    "BlockChoice",
    "ChannelDesign",
    "ChannelSpace",
    "Comparison",
    "DepthWidthAllocator",
    "DepthWidthPlan",
    "FoundSubnet",
    "Shape",
    "SubsetEvaluations",
    "Widths",
    "clusters",
    "compare_with_best",
    "depth_width_plan",
    "divisible",
    "effective_width",
    "equal_flops_shapes",
    "equal_parameter_shapes",
    "evolution",
    "filter_target",
    "fit_channels_to_budget",
    "fptq_strategy",
    "global_rows",
    "greedy",
    "greedy_blocks",
    "greedy_descent",
    "integer",
    "keep_blocks",
    "lagrangian",
    "linear_channels",
    "mean_profile",
    "merge_ties",
    "minimum",
    "mixer_connections",
    "one_shot",
    "optimal_mixer_sizes",
    "pareto",
    "proportional_widths",
    "search_channels",
    "search_subnets",
    "shape_of",
    "sloped_channels",
    "stagewise_channels",
    "uniform",
    "width_schedule",
]

ALLOCATORS: Registry[Callable[..., Allocation]] = Registry("allocator")
"""Allocators by name."""

for _function in (clusters, evolution, greedy, integer, lagrangian, one_shot, uniform):
    ALLOCATORS.add(_function.__name__, _function)
ALLOCATORS.add("bit_search", "layerwright.allocate.bit_search:bit_search")
