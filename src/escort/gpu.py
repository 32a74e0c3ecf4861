"""What the search for configs needs to know of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


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


H200 = Gpu(multiprocessors=132, shared_bytes=232448)
