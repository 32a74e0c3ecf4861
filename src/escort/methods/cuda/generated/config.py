"""The knobs of generated kernels."""

from __future__ import annotations

from dataclasses import dataclass, fields

from escort.cuda.gpu import Gpu

LANES = 32  # threads of a warp


@dataclass(frozen=True)
class GeneratedConfig:
    """The knobs of generated kernels, all of them scalars.

    Attributes:
        out_channels: per part of the code. A block runs a part for a tile of ``32 * consumers`` words, a thread per
            word.
        consumers: warps that run the code.
        producers: warps that copy the input.
        channel_block: input channels per stage.
        copy: words per copy, 1, 2 or 4; 0 copies all words of a channel at once, of an arranged input.
        stages: of the ring in shared memory.
        occupancy: blocks per multiprocessor that registers must leave room for.
        start_points: chunks at which tiles begin. Multiprocessors that share an instruction cache then bring in
            different chunks of the code for each other.
        sums: for 16-bit storage: sums per output channel, each of a share of the products. They are added up in
            float32 in the end.
        arranged: a kernel of its own (generated_arrange.cu) first lays out the input as words, padding included. Words
            of 16-bit storage then hold two samples, so that no tap lies between words.
        split: blocks of a cluster that share a tile and its output channels, each for a slice of the input channels. In
            the end each adds up all slices' sums of some output channels.
        multicast: blocks of a cluster that run the same part for neighbouring tiles. Their multiprocessors share an
            instruction cache, through which the code then comes once for all of them. One of split and multicast is 1.
        prefetch_warps: warps that only jump through the code, ahead of the consumers, so that it is in the instruction
            caches when they come.

    Raises:
        TypeError: where a knob is no Python scalar.
    """

    out_channels: int
    consumers: int
    producers: int
    channel_block: int
    copy: int = 1
    stages: int = 3
    occupancy: int = 1
    start_points: int = 1
    sums: int = 1
    arranged: bool = False
    split: int = 1
    multicast: int = 1
    prefetch_warps: int = 0

    def __post_init__(self) -> None:
        for knob in fields(self):
            if not isinstance(value := getattr(self, knob.name), int):
                raise TypeError(f"{knob.name} takes a whole number, got {value!r}")

    def __str__(self) -> str:
        """The knobs that differ from their defaults, as the generated text says them too."""
        knobs = ((knob.name, getattr(self, knob.name), knob.default) for knob in fields(self))
        return ", ".join(f"{name}={value}" for name, value, default in knobs if value != default)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return (self.consumers + self.producers + self.prefetch_warps) * LANES

    @property
    def tile(self) -> int:
        """Words of a tile."""
        return self.consumers * LANES

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.split * self.multicast

    def clusters(self, gpu: Gpu) -> int:
        """Clusters that run at a time."""
        return gpu.clusters(self.cluster) * self.occupancy
