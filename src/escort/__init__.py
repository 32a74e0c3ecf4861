"""Escort: fast inference for pruned (unstructured-sparse) convolutional networks in PyTorch.

How to use it:

    print(escort.forecast(model.eval(), example))    # what pruning would gain on this device, before it is done
    escort.prune.uniform(model, 0.9)                 # or a model that you have pruned
    fast = escort.convert(model.eval(), example)     # a drop-in: every convolution by its fastest method
    print(fast.plan)                                 # what runs each layer, and why
    escort.save(fast, "model.escort")                # one file without code
    fast = escort.load("model.escort")               # measured anew where the machine is another one
    model = escort.from_onnx("model.onnx")           # a network that another tool wrote, to convert like any other

Public are the names in ``escort.__all__``. Everything else in the package is internal and may change at any time.
"""

import logging
from importlib.metadata import version

from escort import prune
from escort.artifact import ArtifactError, load, save
from escort.filter import SparseFilter
from escort.integrations import ray
from escort.integrations.hub import from_pretrained, push_to_hub, save_pretrained
from escort.integrations.onnx import OnnxError, from_onnx
from escort.layers import Images
from escort.network.compare import Comparison, compare
from escort.network.convert import convert, replan
from escort.network.forecast.forecast import Forecast, forecast
from escort.network.model import ConvertedModel
from escort.network.plan import NetworkPlan
from escort.planner import Candidate, Plan, plan_layer
from escort.problem import Epilogue, Problem

__version__ = version("escort-sparse")
ConvertedModel.save_pretrained, ConvertedModel.push_to_hub = save_pretrained, push_to_hub  # which save files
logging.getLogger(__name__).addHandler(logging.NullHandler())  # what is logged shows where an application says so

__all__ = [
    "ArtifactError",
    "Candidate",
    "Comparison",
    "ConvertedModel",
    "Epilogue",
    "Forecast",
    "Images",
    "NetworkPlan",
    "OnnxError",
    "Plan",
    "Problem",
    "SparseFilter",
    "__version__",
    "compare",
    "convert",
    "forecast",
    "from_onnx",
    "from_pretrained",
    "load",
    "plan_layer",
    "prune",
    "ray",
    "replan",
    "save",
]


def __dir__() -> list[str]:
    return list(__all__)
