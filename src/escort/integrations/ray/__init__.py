"""Many images on many devices: what Ray Data calls a converted network with, and a job of images that resumes.

:class:`Predictor` is for pipelines of one's own; it takes no Ray by itself. `job` is what ``escort run --engine ray``
does: `workers` read images and predict, `sink` hands the predictions to `blocks`, which are files of which each is
there as a whole or not at all. Whatever imports Ray or pyarrow is imported where it is used.
"""

from escort.integrations.ray.predictor import Predictor

__all__ = ["Predictor"]
