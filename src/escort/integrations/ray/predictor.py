"""A saved network as a callable on batches of numpy arrays, as actors of Ray Data hold it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from escort import cache
from escort.arguments import is_whole
from escort.artifact.load import load
from escort.runtime.graphs import Policy


class Predictor:
    """A saved network for ``map_batches`` of Ray Data: each actor loads it once.

    Example:
        >>> from ray.data import ActorPoolStrategy
        >>> dataset.map_batches(
        ...     escort.ray.Predictor,
        ...     fn_constructor_kwargs={"path": "/shared/model.escort"},
        ...     batch_size=32,
        ...     batch_format="numpy",
        ...     compute=ActorPoolStrategy(size=2),
        ...     num_gpus=1,  # or num_cpus=4, with threads=4 for the constructor
        ... )

    Actors of a machine load one after the other: where layers have to be measured anew, the first one does that, and
    the others find its plans in the plan store.

    Args:
        path: what :func:`escort.save` wrote, at a place that every machine reads.
        model, device, remeasure, kernels: as of :func:`escort.load`.
        columns: the columns that the network takes, in the order of its inputs: (N, ...) arrays, which are brought to
            the types that it was planned for.
        output: the column of its result.
        threads: of the CPU, for this process; by default as many as torch has, which is what Ray gives the actor.
        graphs: for which batches there are CUDA graphs, see `ConvertedModel.graphs`: the last batch of a block may
            have any size, so that others than powers of two are padded.

    Raises:
        ArtifactError, ValueError, TypeError, OSError: as :func:`escort.load`, and for columns or threads that are none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        columns: Sequence[str] = ("x",),
        output: str = "outputs",
        threads: int | None = None,
        graphs: Policy = "buckets",
        **loading: Any,
    ) -> None:
        if isinstance(columns, str):
            raise TypeError(f"columns is a list of names, got {columns!r}; write [{columns!r}]")
        if threads is not None:
            if not is_whole(threads) or threads < 1:
                raise ValueError(f"threads is a whole number from 1 up, got {threads!r}; leave it out for torch's own")
            torch.set_num_threads(threads)
        with cache.turn("loading"):
            self.model = load(path, model, **loading)
        self.model.graphs.policy = graphs
        self._columns, self._output = tuple(columns), output
        if len(self._columns) != len(self.model.plan.input_types):
            raise ValueError(
                f"{path}: the network takes {len(self.model.plan.input_types)} inputs, got the columns "
                f"{', '.join(self._columns)}; name one for each"
            )

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch's other columns, and the network's result, in float32 where numpy has not its type.

        Raises:
            KeyError: for a column that the batch has not.
            TypeError: where the network returns no tensor.
        """
        types = self.model.plan.input_types
        with torch.inference_mode():
            inputs = [self._tensor(batch[name], kind) for name, kind in zip(self._columns, types, strict=True)]
            outputs = self.model(*inputs)
            if not isinstance(outputs, torch.Tensor):
                raise TypeError(
                    f"the network returns a {type(outputs).__name__}, and a column takes one tensor; convert a module "
                    "that returns the one of interest"
                )
            if outputs.dtype is torch.bfloat16:  # which numpy has not
                outputs = outputs.float()
            result = outputs.cpu().numpy()
        return {**{name: batch[name] for name in batch if name not in self._columns}, self._output: result}

    def _tensor(self, array: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
        """A column on the network's device. Ray's arrays lie in shared memory, which must not be written to.

        To a GPU they go by page-locked memory, from which they are copied while this thread goes on.
        """
        on_gpu = self.model.plan.device != "cpu"
        own = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, pin_memory=on_gpu)
        np.copyto(own.numpy(), array)
        return own.to(self.model.plan.device, non_blocking=True).to(dtype)
