"""A language model behind HTTP, in the form of OpenAI's interface.

- `create_app`: the application; `Limits`: what it accepts.
- `Scheduler`: continuous batching: requests join and leave a running batch.
"""

from __future__ import annotations

from layerwright.recipes.server._app import create_app
from layerwright.recipes.server._scheduler import BusyError, Event, Job, Scheduler
from layerwright.recipes.server._schema import Limits

__all__ = ["BusyError", "Event", "Job", "Limits", "Scheduler", "create_app"]
