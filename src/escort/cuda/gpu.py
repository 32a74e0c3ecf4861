"""What the search for configs needs to know of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_CLUSTERED = 0.91  # of the multiprocessors, as an H200 has them: 120 of 132


@dataclass(frozen=True)
class Gpu:
    """What the search needs to know of a device."""

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
        """Clusters of so many blocks that run at a time, with a block on each multiprocessor that takes part.

        Those of more than two must lie within a group of multiprocessors, where they do not fit all of them.
        """
        return int(self.multiprocessors * (_CLUSTERED if size > 2 else 1.0)) // size


H200 = Gpu(multiprocessors=132, shared_bytes=232448)
