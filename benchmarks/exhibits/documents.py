"""Documents that hold the tables and plots of results."""

from __future__ import annotations

import re
from collections.abc import Mapping

from benchmarks.exhibits.catalogue import exhibits, tables
from benchmarks.exhibits.committed import committed_exhibits
from benchmarks.exhibits.scaling import read_scaling, scaling_table
from benchmarks.exhibits.zoo import zoo_tables
from benchmarks.result_files import Result
from benchmarks.zoo import read_zoo
from escort.report import Figure, Table, markdown

_BEGIN, _END = re.compile(r"<!-- table: (\S+) -->"), "<!-- end -->"
_PLOT = re.compile(r"!\[[^]]*\]\(((?:[\w.-]+/)*([\w-]+)\.svg)\)")


def render(text: str, results: Mapping[str, Result]) -> str:
    """A Markdown document with its tables replaced by those of the results.

    Beside the results' own tables there are those of committed files (:mod:`benchmarks.exhibits.committed`). A table's
    place is between a line ``<!-- table: NAME -->`` and a line ``<!-- end -->``; the rest stays as it is.

    Raises:
        ValueError: where there is no such place, one does not end, or the results have no table of that name.
    """
    known = tables(results) | {name: shown for name, shown in committed_exhibits() if isinstance(shown, Table)}
    known |= zoo_tables(*read_zoo()) | {"scaling": scaling_table(read_scaling())}
    lines: list[str] = []
    name = None
    names = 0
    for number, line in enumerate(text.splitlines(), 1):
        begin = _BEGIN.fullmatch(line.strip())
        if begin and name is not None:
            raise ValueError(f"line {number}: table {begin[1]} begins before the place of table {name} ended: {_END}")
        if begin:
            name = begin[1]
            names += 1
            if name not in known:
                raise ValueError(f"line {number}: the results hold no table {name}; there are {', '.join(known)}")
            lines += [line, "", markdown(known[name]), ""]
        elif name is None and line.strip() == _END:
            raise ValueError(f"line {number}: {_END} ends nothing")
        elif name is None:
            lines.append(line)
        elif line.strip() == _END:
            lines.append(line)
            name = None
    if name is not None:
        raise ValueError(f"the place of table {name} does not end; put {_END} on a line behind it")
    if not names:
        raise ValueError(
            "there is no place for a table; put <!-- table: totals --> and <!-- end --> on lines of their own"
        )
    return "\n".join(lines) + "\n"


def illustrations(text: str, results: Mapping[str, Result]) -> dict[str, Figure]:
    """The plots that a document shows, by the path by which it does. Raises ImportError without matplotlib."""
    plots = {name: shown for name, shown in (*exhibits(results), *committed_exhibits()) if not isinstance(shown, Table)}
    return {path: plots[name]() for path, name in _PLOT.findall(text) if name in plots}
