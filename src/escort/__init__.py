"""Escort: fast inference for pruned (unstructured-sparse) convolutional networks in PyTorch."""

from importlib.metadata import version

from escort import prune
from escort.artifact import ArtifactError, load, save
from escort.filter import SparseFilter
from escort.network.convert import ConvertedModel, NetworkPlan, convert
from escort.problem import Epilogue, Problem

__version__ = version("escort-sparse")

__all__ = [
    "ArtifactError",
    "ConvertedModel",
    "Epilogue",
    "NetworkPlan",
    "Problem",
    "SparseFilter",
    "convert",
    "load",
    "prune",
    "save",
]
