"""Escort: fast inference for pruned (unstructured-sparse) convolutional networks in PyTorch."""

from escort import prune
from escort.bench import _own_version
from escort.convert import ConvertedModel, NetworkPlan, convert
from escort.problem import Epilogue, Problem
from escort.sparse import StretchedCSR

__version__ = _own_version()

__all__ = ["ConvertedModel", "Epilogue", "NetworkPlan", "Problem", "StretchedCSR", "convert", "prune"]
