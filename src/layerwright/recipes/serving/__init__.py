"""Serving a language model, simulated: requests in, throughput and latency out.

- `Request`, `make_requests`, `read_requests`: the load.
- `ServingSimulator`: continuous batching on devices with one or two processors; gives a `ServingReport`.
- `StageTimer`, `POLICIES`: time of one stage, and who runs what.
"""

from layerwright.recipes.serving.metrics import Distribution, ServingReport
from layerwright.recipes.serving.requests import Request, make_requests, read_requests
from layerwright.recipes.serving.simulator import ServingSimulator
from layerwright.recipes.serving.stages import POLICIES, StageTime, StageTimer, default_policy

__all__ = [
    "POLICIES",
    "Distribution",
    "Request",
    "ServingReport",
    "ServingSimulator",
    "StageTime",
    "StageTimer",
    "default_policy",
    "make_requests",
    "read_requests",
]
