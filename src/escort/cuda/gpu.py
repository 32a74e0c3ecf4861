"""What the search for configs needs to know of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_CLUSTERED = 0.91  # of the multiprocessors, as an H200 has them: 120 of 132
_RESERVED_BYTES = 1024  # of shared memory, with every block
_ALIGNED_BYTES = 128  # what shared memory is given out in


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

    def spreading_bytes(self, blocks: int, cluster: int = 1) -> int:
        """The shared memory of a block by which no multiprocessor takes more of so many blocks than one of them must.

        Launches overlap, and blocks are placed while those of the launch before still run. Where there is room, some
        multiprocessors then get several blocks while others get none.

        Args:
            cluster: how many of the blocks are in a cluster.
        """
        most = -(-max(blocks, 1) // (self.clusters(cluster) * cluster))
        too_many = (self.shared_bytes + _RESERVED_BYTES) // (most + 1) - _RESERVED_BYTES
        return max(0, too_many // _ALIGNED_BYTES * _ALIGNED_BYTES + _ALIGNED_BYTES)


H200 = Gpu(multiprocessors=132, shared_bytes=232448)
