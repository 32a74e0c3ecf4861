"""Work for all cores at once."""

from escort.planner.planner import on_all_cores

__all__ = ["on_all_cores"]
