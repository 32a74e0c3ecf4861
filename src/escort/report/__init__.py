"""Plans and measurements as tables for terminals and Markdown, as plots, and as one self-contained HTML page.

A page is a title and a sequence of sections. It holds its styles and plots, asks the network for nothing, follows the
reader's light or dark theme, and everything in it but the plots is escaped text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal

import rich.box
import rich.table
import rich.text

from escort.network.convert import NetworkPlan
from escort.planner.machine import Machine
from escort.planner.plan import Plan
from escort.problem import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    heading: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """A few figures that a reader should see first, by label."""

    heading: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """Rows of cells, one per column; columns of numbers are set flush right."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.heading!r} has {len(self.columns)} columns, got the row {row}")


@dataclass(frozen=True)
class Figure:
    """A plot as SVG markup, and what it shows in words for readers who cannot see it."""

    heading: str
    svg: str
    description: str


Section = Text | Facts | Table | Figure


def plan_section(plan: NetworkPlan, heading: str = "Plan per layer") -> Table:
    """What runs each convolution, how long it takes there, and what became of the other methods."""
    rows = []
    for name, layer in plan.layers.items():
        row = (name, convolution(layer.problem), layer.method, _us(layer.time_us), _us(layer.dense_time_us))
        rows.append((*row, _ratio(layer.dense_time_us, layer.time_us), _others(layer)))
    rows += [(name, "", "left alone", "-", "-", "-", reason) for name, reason in plan.skipped.items()]
    kept = "kept dense" if plan.kept_dense else "escort"
    times = _us(plan.converted_time_us), _us(plan.dense_time_us), _ratio(plan.dense_time_us, plan.converted_time_us)
    rows.append(("whole network", "", kept, *times, plan.reason or ""))
    columns = ("Layer", "Convolution", "Method", "µs", "Dense µs", "Speedup", "Others µs")
    shapes = ", ".join("x".join(map(str, shape)) for shape in plan.input_shapes)
    lying = "" if plan.memory_format == "contiguous" else f", tensors in {plan.memory_format}"
    caption = f"Medians for an input of {shapes}{lying}, on {machine_line(plan.machine)}."
    return Table(heading, columns, tuple(rows), caption)


def machine_line(machine: Machine) -> str:
    """What a measurement was made on, in a few words."""
    host = f"{machine.threads} thread{'' if machine.threads == 1 else 's'}"
    if machine.cuda:
        host = f"driver {machine.driver}, CUDA {machine.cuda}"
    return f"{machine.device}, {machine.isa}, {host}, torch {machine.torch}"


def plan_table(plan: NetworkPlan) -> rich.table.Table:
    """:func:`plan_section` for the terminal."""
    return terminal(plan_section(plan))


def benchmark_section(rows: Iterable[Mapping[str, Any]], heading: str = "Benchmark") -> Table:
    """One line per layer and batch with the best time of each method, from benchmark rows.

    Args:
        rows: mappings that hold at least network, weights, layer, batch, dtype, method and time_us (None: not timed).
    """
    best: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        key = tuple(str(row[field]) for field in ("network", "weights", "layer", "batch", "dtype"))
        times = best.setdefault(key, {})
        if row["time_us"] is not None:
            times[row["method"]] = min(row["time_us"], times.get(row["method"], float("inf")))
    methods = tuple(dict.fromkeys(method for times in best.values() for method in times))
    columns = ("Network", "Weights", "Layer", "Batch", "Precision", *(f"{method} µs" for method in methods), "Fastest")
    table = []
    for key, times in best.items():
        fastest = min(times, key=times.__getitem__, default="-")
        table.append((*key, *(_us(times.get(method)) for method in methods), fastest))
    return Table(heading, columns, tuple(table))


def terminal(table: Table) -> rich.table.Table:
    """The same rows for a rich console; brackets in cells are text, not markup."""
    title, caption = rich.text.Text(table.heading), rich.text.Text(table.caption) if table.caption else None
    out = rich.table.Table(title=title, caption=caption, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(table.columns):
        numeric = _is_numeric(table, index)
        out.add_column(rich.text.Text(column), justify="right" if numeric else "left", no_wrap=numeric or index == 0)
    for row in table.rows:
        out.add_row(*(rich.text.Text(cell) for cell in row))
    return out


def markdown(table: Table) -> str:
    """The same rows as a Markdown table, columns of numbers flush right, with the caption as a paragraph behind it."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rules = ("---:" if _is_numeric(table, index) else "---" for index in range(len(table.columns)))
    lines = [line(table.columns), line(rules), *(line(row) for row in table.rows)]
    return "\n".join(lines + ([f"\n{table.caption}"] if table.caption else []))


def bar_chart(heading: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], axis: str) -> Figure:
    """Groups of bars that start at zero, one bar per series, each with its number.

    Args:
        series: (len(groups),) values by name.
        axis: what the values are, with their unit.
    """

    def draw(axes: Axes) -> None:
        width = 0.8 / len(series)
        for index, (name, values) in enumerate(series.items()):
            places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
            bars = axes.bar(places, values, width * 0.94, label=name, color=_SERIES[index])
            axes.bar_label(bars, [_short(value) for value in values], padding=2, fontsize=8, color=_INK)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(axis)

    numbers = "; ".join(
        f"{group}: " + ", ".join(f"{name} {_short(values[index])}" for name, values in series.items())
        for index, group in enumerate(groups)
    )
    return _figure(heading, draw, len(series) > 1, f"{axis}. {numbers}.")


def horizontal_bars(
    heading: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    axis: str,
    *,
    stacked: bool = False,
    mark: float | None = None,
) -> Figure:
    """Groups of bars from the left, the first group on top: for many groups, or names that are long.

    Args:
        series: (len(groups),) values by name; None draws no bar.
        axis: what the values are, with their unit.
        stacked: one bar per group, its parts end to end; otherwise a bar per series, each with its number.
        mark: where to draw a line across all groups.
    """

    def draw(axes: Axes) -> None:
        width = 0.8 if stacked else 0.8 / len(series)
        left = [0.0] * len(groups)
        for index, (name, values) in enumerate(series.items()):
            shift = 0.0 if stacked else (index - (len(series) - 1) / 2) * width
            lengths = [value or 0.0 for value in values]
            places = [group + shift for group in range(len(groups))]
            bars = axes.barh(places, lengths, width * 0.94, left=left, label=name, color=_SERIES[index])
            if stacked:
                left = [start + length for start, length in zip(left, lengths, strict=True)]
            else:
                axes.bar_label(bars, [_short(v) if v else "" for v in values], padding=2, fontsize=7, color=_INK)
        if mark is not None:
            axes.axvline(mark, color=_INK, linewidth=0.8)
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.margins(x=0.08)
        axes.set_xlabel(axis)

    numbers = "; ".join(
        f"{group}: "
        + ", ".join(f"{name} {_short(v) if (v := values[index]) else '-'}" for name, values in series.items())
        for index, group in enumerate(groups)
    )
    bars = len(groups) * (1 if stacked else len(series))
    height = 1.1 + max(0.13 * bars, 0.24 * len(groups))
    return _figure(heading, draw, len(series) > 1, f"{axis}. {numbers}.", height, grid="x")


def line_chart(
    heading: str, x: Sequence[float], series: Mapping[str, Sequence[float]], x_axis: str, y_axis: str
) -> Figure:
    """Lines with markers over a common x.

    Args:
        series: (len(x),) values by name.
    """

    def draw(axes: Axes) -> None:
        for index, (name, values) in enumerate(series.items()):
            axes.plot(x, values, _MARKS[index], label=name, color=_SERIES[index], markersize=4)
        if all(isinstance(place, int) for place in x):
            axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(x_axis)
        axes.set_ylabel(y_axis)

    ends = ", ".join(f"{name} from {_short(values[0])} to {_short(values[-1])}" for name, values in series.items())
    return _figure(heading, draw, len(series) > 1, f"{y_axis} by {x_axis}: {ends}.")


def require_matplotlib() -> None:
    """Raises ImportError, with the remedy, where charts cannot be drawn; ask before long work that ends in one."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install escort-sparse[demo]") from error


def write_html(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page. Raises OSError where `path` cannot be written."""
    body = "\n".join(_html(section) for section in sections)
    page = _PAGE.substitute(title=escape(title), body=body)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def write_svg(path: Path, figure: Figure) -> None:
    """Write the plot as a file of its own, on white."""
    svg = figure.svg.replace("currentColor", "#1b1f24").replace("var(--rule)", "#d5dae0")
    name = f'<svg role="img" aria-label="{escape(figure.description)}" style="background: #fff"'
    path.write_text(svg.replace("<svg", name, 1), encoding="utf-8")


def _html(section: Section) -> str:
    heading = f"<section>\n<h2>{escape(section.heading)}</h2>\n"
    if isinstance(section, Text):
        inner = "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in section.paragraphs)
    elif isinstance(section, Facts):
        facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in section.facts.items())
        inner = f"<dl>{facts}</dl>"
    elif isinstance(section, Figure):
        svg = section.svg.replace("<svg", f'<svg role="img" aria-label="{escape(section.description)}"', 1)
        inner = f"<figure>{svg}</figure>"
    else:
        inner = _html_table(section)
    return f"{heading}{inner}\n</section>"


def _html_table(table: Table) -> str:
    numeric = [_is_numeric(table, index) for index in range(len(table.columns))]
    classes = [' class="number"' if flush_right else "" for flush_right in numeric]
    head = "".join(f'<th scope="col"{c}>{escape(name)}</th>' for name, c in zip(table.columns, classes, strict=True))
    body = ""
    for first, *rest in table.rows:
        cells = "".join(f"<td{c}>{escape(cell)}</td>" for cell, c in zip(rest, classes[1:], strict=True))
        body += f'<tr><th scope="row"{classes[0]}>{escape(first)}</th>{cells}</tr>\n'
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    # The region takes the keyboard focus, so that a table wider than the screen can be scrolled without a mouse.
    region = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.heading)}">'
    return f"{region}<table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"


#: Stand-ins that :func:`_figure` turns into the page's colours, which follow the reader's theme.
_INK, _RULE = "#010203", "#040506"
_SERIES = ("#8a8f98", "#3b7dd8", "#d9730d", "#2f9e6e", "#a566cc")  # each at least 3:1 on both grounds
_MARKS = ("o-", "s--", "^:", "D-.", "v-")


def _figure(
    heading: str,
    draw: Callable[[Axes], None],
    legend: bool,
    description: str,
    height: float = 3.0,
    grid: Literal["x", "y"] = "y",
) -> Figure:
    """What `draw` draws on a pair of axes, `height` inches high, as an `<svg>` element whose text is text."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    # Element ids derive from the salt: the same in every run, and other ones in the page's other figures.
    style: dict[Any, Any] = {
        "svg.hashsalt": f"{heading} {description}",
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": 9,
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    style |= dict.fromkeys(("axes.edgecolor", "grid.color"), _RULE)
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(6.8, height), layout="constrained")
        axes = canvas.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        if legend:
            canvas.legend(loc="outside upper left", ncols=len(_SERIES), frameon=False)
        buffer = StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)  # the page scales it by its viewBox
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)  # axes_1 and the like would repeat in the next figure
    return Figure(heading, svg.replace(_INK, "currentColor").replace(_RULE, "var(--rule)"), description)


def convolution(p: Problem) -> str:
    """A convolution in a few words: channels, kernel, input size, stride and groups."""
    text = f"{p.in_channels}->{p.out_channels} {p.kernel_size[0]}x{p.kernel_size[1]}, {p.height}x{p.width}"
    if p.stride != (1, 1):
        text += f" /{p.stride[0]}" if p.stride[0] == p.stride[1] else f" /{p.stride[0]},{p.stride[1]}"
    return text + (f", {p.groups} groups" if p.groups > 1 else "")


def _others(plan: Plan) -> str:
    """The best times of the methods that have no column of their own, and why a method was refused."""
    texts = []
    for method in dict.fromkeys(candidate.method for candidate in plan.candidates if candidate.method != plan.method):
        time_us = plan.best_us(method)
        if method == "dense" and time_us is not None:
            continue
        reasons = (c.reason for c in plan.candidates if c.method == method and c.reason)
        texts.append(f"{method} {_us(time_us)}" if time_us is not None else f"{method}: {next(reasons, 'not timed')}")
    return "; ".join(texts)


def _us(time_us: float | None) -> str:
    if time_us is None:
        return "-"
    return f"{time_us:,.0f}" if time_us >= 10 else f"{time_us:.1f}"


def _ratio(slow_us: float | None, fast_us: float | None) -> str:
    return f"{slow_us / fast_us:.2f}x" if slow_us and fast_us else "-"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _is_numeric(table: Table, index: int) -> bool:
    cells = [row[index] for row in table.rows]
    return bool(cells) and all(re.fullmatch(r"[-+]?[\d,.]+(e-?\d+)?( ?[%x])?|-", cell) for cell in cells)


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ground: #fff; --ink: #1b1f24; --quiet: #59636e; --rule: #d5dae0; --raised: #f4f6f8; --accent: #2a63b5 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --ink: #e6e9ed; --quiet: #9ba5b0; --rule: #363d46; --raised: #1d2228; --accent: #8ab4f2 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1.5rem }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem }
p { max-width: 46rem; margin: .5rem 0 }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(9rem, 30%), 1fr)); gap: .75rem; margin: 0 }
dl div { background: var(--raised); border-radius: .5rem; padding: .75rem .9rem }
dt, caption { color: var(--quiet); font-size: .85rem }
dd { margin: 0; font-size: 1.45rem; font-variant-numeric: tabular-nums }
figure { margin: 0; max-width: 46rem }
svg { display: block; width: 100%; height: auto }
svg text { font-family: inherit !important }
.scroll { overflow-x: auto }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
table { border-collapse: collapse; font-size: .9rem }
caption { caption-side: bottom; text-align: left; padding-top: .5rem }
th, td { text-align: left; padding: .4rem 1.5rem .4rem 0; border-bottom: 1px solid var(--rule); vertical-align: top }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom }
tbody th { font-weight: 500 }
tbody th, .number { white-space: nowrap }
.number { text-align: right; font-variant-numeric: tabular-nums }
</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
""")
