"""Keeping the process's freed memory for its next forward.

glibc hands large freed blocks back to the system. A network frees its activations in every forward and would get them
back as untouched pages, each a page fault: for ResNet-50 on a batch of 8 those cost as much time as the convolutions.
"""

from __future__ import annotations

import os

from escort.kernels import _cpu

#: Set to 0 to leave the allocator as it is.
VARIABLE = "ESCORT_KEEP_MEMORY"
_MOST_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Lets malloc keep up to 1 GiB of freed memory, for the whole process. True where that took effect (glibc)."""
    return os.environ.get(VARIABLE, "1") != "0" and _cpu.keep_freed_memory(_MOST_BYTES)
