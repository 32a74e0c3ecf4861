"""The input as words of 32 bits: the sequence of them that tiles are cut from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from escort.problem import Problem


@dataclass(frozen=True)
class Words:
    """The sequence of words that tiles are cut from: all samples' rows, in a pitch that leaves room for the padding.

    A word is one position; for 16-bit storage two neighbouring columns of a row, or a position of two samples. A
    strided convolution has a plane of words for each phase, the input's rows and columns at a distance of the stride:
    between planes it has stride 1.

    Attributes:
        columns, samples: of a word; one of them is 1.
        pitch: words from row to row, a multiple of what is copied at once.
        sample_rows: rows from sample to sample, or from pair to pair.
        top, left: rows above the input's first in a plane, and columns in front of its first; these are so many that a
            row begins with a whole copy.
        phases: first row and column of each plane; one plane holds all where the stride is 1.
    """

    problem: Problem
    columns: int
    samples: int
    pitch: int
    sample_rows: int
    top: int
    left: int
    phases: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, problem: Problem, *, copy: int = 1, arranged: bool = False) -> Words:
        """The words of a problem's input, for these knobs of a `GeneratedConfig`."""
        elements, copy = elements_per_word(problem), 1 if arranged else copy
        columns, samples = (1, elements) if arranged else (elements, 1)
        step = copy * columns
        reads = [
            [divmod(at, stride) for at in taps] for taps, stride in zip(_taps(problem), problem.stride, strict=True)
        ]
        top, left = (max(-min(taps)[0], 0) for taps in reads)
        left = -(-left // step) * step
        # The padding behind a row is that in front of the next row, and so for samples.
        rows, width = (
            max(outputs, outputs + max(taps)[0], min(-(-inputs // stride), outputs + max(taps)[0]) + before)
            for outputs, inputs, stride, taps, before in zip(
                problem.output_shape[2:], problem.input_shape[2:], problem.stride, reads, (top, left), strict=True
            )
        )
        phases = sorted({(row, column) for _, row in reads[0] for _, column in reads[1]})
        return cls(problem, columns, samples, -(-width // step) * copy, rows, top, left, tuple(phases))

    @property
    def elements(self) -> int:
        """Elements of a word."""
        return self.columns * self.samples

    def tap(self, r: int, s: int) -> tuple[int, int]:
        """The plane that tap (r, s) reads, and there the distance in elements from a position."""
        rows, columns = _taps(self.problem)
        (down, row), (right, column) = (
            divmod(rows[r], self.problem.stride[0]),
            divmod(columns[s], self.problem.stride[1]),
        )
        return self.phases.index((row, column)), (down + self.top) * self.pitch * self.columns + right + self.left

    @cached_property
    def reach(self) -> int:
        """How many words behind a word its last tap reads."""
        height, width = self.problem.kernel_size
        last = max(self.tap(r, s)[1] for r in range(height) for s in range(width))
        return -(-last // self.columns)

    def count(self, samples: int) -> int:
        """Words of so many samples, up to the last output."""
        p = self.problem
        unused = (self.sample_rows - p.out_height) * self.pitch + self.pitch - -(-p.out_width // self.columns)
        return -(-samples // self.samples) * self.sample_rows * self.pitch - unused if samples else 0


def computed(problem: Problem) -> Problem:
    """The problem that kernels compute: that of fp32 for TF32, and of one long row for a pointwise convolution."""
    if problem.precision == "tf32":
        problem = replace(problem, precision="fp32")
    if problem.kernel_size == problem.stride == (1, 1) and not any(problem.padding):
        problem = replace(problem, height=1, width=problem.height * problem.width)
    return problem


def elements_per_word(problem: Problem) -> int:
    """How many elements of the problem's storage type a word of 32 bits holds."""
    return 1 if problem.precision in ("fp32", "tf32") else 2


def copies_as_it_is(problem: Problem, copy: int) -> bool:
    """Whether copies of so many words can bring the input without a kernel that arranges it: rows are whole copies."""
    return copy > 0 and problem.stride == (1, 1) and problem.width % (copy * elements_per_word(problem)) == 0


def _taps(problem: Problem) -> tuple[list[int], list[int]]:
    """Where the taps of the output at row and column 0 read, in rows and in columns."""
    (rows, columns), (down, right), padding = problem.kernel_size, problem.dilation, problem.padding
    return [r * down - padding[0] for r in range(rows)], [s * right - padding[2] for s in range(columns)]
