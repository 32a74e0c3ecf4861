"""Documents that hold the tables, plots and single numbers of results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from benchmarks.exhibits.catalogue import exhibits, file_of
from benchmarks.exhibits.committed import committed, committed_exhibits
from benchmarks.exhibits.conditions import sources
from benchmarks.exhibits.scaling import read_scaling, scaling_table
from benchmarks.exhibits.zoo import zoo_tables
from benchmarks.result_files import Result
from benchmarks.zoo import read_zoo
from escort.report import Figure, Table, markdown

_BEGIN, _END = re.compile(r"<!-- table: (\S+) -->"), "<!-- end -->"
_VALUE = re.compile(r"<!-- value: (.+?) -->(.*?)<!-- /value -->", re.DOTALL)
_PLOT = re.compile(r"!\[[^]]*\]\(((?:[\w.-]+/)*([\w.-]+)\.svg)\)")


def render(text: str, results: Mapping[str, Result]) -> str:
    """A Markdown document with its tables and values replaced by those of the results.

    Beside the results' own tables there are those of committed files (:mod:`benchmarks.exhibits.committed`). A table's
    place is between a line ``<!-- table: NAME -->`` and a line ``<!-- end -->``; the files that it is made of are named
    below it, with their commits. In the place of a table of a precision that was not measured a sentence says so. A
    value is a cell of a table, in a sentence:
    ``<!-- value: NAME; COLUMN; OTHER COLUMN=TEXT; ... -->1.43x<!-- /value -->`` is that of the one row in which other
    columns hold these texts. The rest stays as it is.

    Raises:
        ValueError: where there is no such place, one does not end, there is no table of that name, or a value is that
            of no row or of several.
    """
    known: dict[str, Table] = {}
    origins: dict[str, str] = {}
    for found, made in ((results, exhibits(results, text)), (committed(), committed_exhibits())):
        for name, shown, files in made:
            if isinstance(shown, Table):
                known[name] = shown
                origins[name] = sources(files, found) if files else ""
    known |= zoo_tables(*read_zoo()) | {"scaling": scaling_table(read_scaling())}
    text, values = _VALUE.subn(partial(_filled, known), text)
    rendered, tables = _with_tables(text, known, origins)
    if not tables and not values:
        raise ValueError(
            "there is no place for a table; put <!-- table: totals --> and <!-- end --> on lines of their own"
        )
    return rendered


def _with_tables(text: str, known: Mapping[str, Table], origins: Mapping[str, str]) -> tuple[str, int]:
    """The text with its tables, and how many there are."""
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
            file = file_of(name)
            if name not in known and file is None:
                raise ValueError(f"line {number}: the results hold no table {name}; there are {', '.join(known)}")
            shown = markdown(known[name]) if name in known else f"`{file}` has no rows of this from this device."
            lines += [line, "", shown, ""]
            if origin := origins.get(name):
                lines += [origin, ""]
        elif name is None and line.strip() == _END:
            raise ValueError(f"line {number}: {_END} ends nothing")
        elif name is None:
            lines.append(line)
        elif line.strip() == _END:
            lines.append(line)
            name = None
    if name is not None:
        raise ValueError(f"the place of table {name} does not end; put {_END} on a line behind it")
    return "\n".join(lines) + "\n", names


def _filled(known: Mapping[str, Table], place: re.Match[str]) -> str:
    """A value's place with what the table says."""
    address = " ".join(place[1].split())
    name, column, *conditions = address.split("; ")
    wanted = dict(condition.split("=", 1) for condition in conditions if "=" in condition)
    if name not in known:
        raise ValueError(f"value {address}: there is no table {name}; there are {', '.join(known)}")
    table = known[name]
    if missing := [each for each in (column, *wanted) if each not in table.columns]:
        raise ValueError(f"value {address}: table {name} has no column {missing[0]}, but {'; '.join(table.columns)}")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    found = [row[column] for row in rows if wanted.items() <= row.items()]
    if len(found) != 1:
        raise ValueError(f"value {address}: {len(found)} rows of table {name} are so, of which there must be one")
    return f"<!-- value: {place[1]} -->{found[0]}<!-- /value -->"


def illustrations(text: str, results: Mapping[str, Result]) -> dict[str, Figure]:
    """The plots that a document shows, by the path by which it does. Raises ImportError without matplotlib."""
    shown = (*exhibits(results, text), *committed_exhibits())
    plots = {name: plot for name, plot, _ in shown if not isinstance(plot, Table)}
    return {path: plots[name]() for path, name in _PLOT.findall(text) if name in plots}
