"""What the search for configs needs to know of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_CLUSTERED = 0.91  # of the multiprocessors, as an H200 has them: 120 of 132


@dataclass(frozen=True)
class Gpu:
    """A device in numbers."""

    multiprocessors: int
    shared_bytes: int  # of a block at most
    registers: int = 65536  # of a multiprocessor
    capability: tuple[int, int] = (9, 0)

    @classmethod
    def of(cls, device: str) -> Gpu:
        p: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack some of its attributes
        return cls(
            p.multi_processor_count, p.shared_memory_per_block_optin, p.regs_per_multiprocessor, (p.major, p.minor)
        )

    def clusters(self, size: int) -> int:
        """How many clusters of `size` thread blocks run at a time, a block on each multiprocessor that takes part.

        A cluster of more than two blocks lies within one group of multiprocessors, which may leave some of them idle.
        """
        return int(self.multiprocessors * (_CLUSTERED if size > 2 else 1.0)) // size


H200 = Gpu(multiprocessors=132, shared_bytes=232448)
