"""Escort: fast inference for pruned (unstructured-sparse) convolutional networks in PyTorch."""

from importlib.metadata import version

from escort import prune
from escort.artifact import load, save
from escort.convert import ConvertedModel, NetworkPlan, convert
from escort.problem import Epilogue, Problem
from escort.sparse import StretchedCSR

__version__ = version("escort-sparse")

__all__ = ["ConvertedModel", "Epilogue", "NetworkPlan", "Problem", "StretchedCSR", "convert", "load", "prune", "save"]
