"""From a problem to a plan: what is tried, what may be compiled, what is measured and remembered."""

from escort.planner.plan import Candidate, Plan
from escort.planner.planner import plan_layer, plan_layers

__all__ = ["Candidate", "Plan", "plan_layer", "plan_layers"]
