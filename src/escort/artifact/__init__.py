"""Converted models in one file: saved, loaded, checked."""

from escort.artifact.artifact import ArtifactError, load, load_plan, save

__all__ = ["ArtifactError", "load", "load_plan", "save"]
