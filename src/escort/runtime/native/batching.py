"""How the samples of a batch go through a segment, and which thread computes what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What threads do for: that a sample takes little time, or that many take little together.
Favor = Literal["latency", "throughput"]


@dataclass(frozen=True)
class Batching:
    """How a batch goes through segments whose samples do not depend on each other.

    Attributes:
        samples: how many go through a segment together, from its first step to its last: a chunk; None for all.
        favor: whether all threads share each layer of a chunk ("latency"), or each takes chunks of its own
            ("throughput") as long as there is one for every thread.
    """

    samples: int | None = None
    favor: Favor = "latency"
