"""Converted models in one file, written and read; docs/format.md describes it byte by byte."""

from escort.artifact.errors import ArtifactError
from escort.artifact.load import load, load_plan
from escort.artifact.save import save

__all__ = ["ArtifactError", "load", "load_plan", "save"]
