"""What a run that measures many things tells meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.result_files import Item, Outcome
from escort.cli.console import progress


@dataclass(frozen=True)
class Telling:
    """What :func:`benchmarks.result_files.measure` calls as items begin and end."""

    begin: Callable[[str, str], None]
    end: Callable[[str, str, Outcome], None]


@contextmanager
def telling(work: Mapping[str, Sequence[Item]]) -> Iterator[Telling]:
    """Shows a bar where stderr is a terminal, and a line on stderr about each item that was measured."""
    with progress() as bar:
        task = bar.add_task("starting", total=sum(map(len, work.values())))

        def begin(stem: str, label: str) -> None:
            bar.update(task, description=f"{stem}: {label}")
            bar.advance(task)

        def end(stem: str, label: str, outcome: Outcome) -> None:
            bar.console.print(f"{stem}: {label}: {outcome}", soft_wrap=True)

        yield Telling(begin, end)
