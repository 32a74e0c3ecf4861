"""What was chosen for a layer."""

from escort.planner.planner import Candidate, Plan

__all__ = ["Candidate", "Plan"]
