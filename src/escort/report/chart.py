"""Plots as SVG, with what they show in words for readers who cannot see it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from markupsafe import Markup

from escort.report.console import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Stand-ins that :func:`_figure` turns into the page's colours, which follow the reader's theme.
_INK, _RULE = "#010203", "#040506"
_SERIES = ("#8a8f98", "#3b7dd8", "#d9730d", "#2f9e6e", "#a566cc")  # each at least 3:1 on both grounds
_LEGEND = 96  # characters beside one another, with the room of six for each mark
_MARKS = ("o-", "s--", "^:", "D-.", "v-")


@dataclass(frozen=True)
class Figure:
    """A plot as SVG markup, and what it shows in words for readers who cannot see it."""

    kind: ClassVar[str] = "figure"
    heading: str
    svg: str
    description: str

    def markup(self, style: str = "") -> Markup:
        """The ``<svg>`` element, labelled with the description."""
        opening = Markup('<svg role="img" aria-label="{}"{}').format(
            self.description, Markup(' style="{}"').format(style) if style else ""
        )
        return Markup(self.svg.replace("<svg", opening, 1))


def bar_chart(heading: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], axis: str) -> Figure:
    """Groups of bars that start at zero, one bar per series, each with its number.

    Args:
        series: (len(groups),) values by name.
        axis: what the values are, with their unit.
    """

    groups = [*map(printable, groups)]

    def draw(axes: Axes) -> None:
        width = 0.8 / len(series)
        for index, (name, values) in enumerate(series.items()):
            positions = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
            bars = axes.bar(positions, values, width * 0.94, label=name, color=_SERIES[index])
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

    groups = [*map(printable, groups)]

    def draw(axes: Axes) -> None:
        width = 0.8 if stacked else 0.8 / len(series)
        left = [0.0] * len(groups)
        for index, (name, values) in enumerate(series.items()):
            shift = 0.0 if stacked else (index - (len(series) - 1) / 2) * width
            lengths = [value or 0.0 for value in values]
            positions = [group + shift for group in range(len(groups))]
            bars = axes.barh(positions, lengths, width * 0.94, left=left, label=name, color=_SERIES[index])
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
    heading: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    x_axis: str,
    y_axis: str,
    *,
    mark: float | None = None,
    marks: bool = True,
) -> Figure:
    """Lines over a common x.

    Args:
        series: (len(x),) values by name; NaN where there is none.
        mark: where to draw a line across, at this value.
        marks: whether each value has a marker, as what was measured has.
    """
    series = {printable(name): values for name, values in series.items()}

    def draw(axes: Axes) -> None:
        for index, (name, values) in enumerate(series.items()):
            style = _MARKS[index] if marks else _MARKS[index][1:]
            axes.plot(x, values, style, label=name, color=_SERIES[index], markersize=4)
        if all(isinstance(value, int) for value in x):
            axes.locator_params(axis="x", integer=True)
        if mark is not None:
            axes.axhline(mark, color=_INK, linewidth=0.8)
        axes.set_xlabel(x_axis)
        axes.set_ylabel(y_axis)

    ends = ", ".join(f"{name} from {_short(values[0])} to {_short(values[-1])}" for name, values in series.items())
    return _figure(heading, draw, len(series) > 1, f"{y_axis} by {x_axis}: {ends}.")


def scatter_chart(
    heading: str,
    points: Mapping[str, Sequence[tuple[float, float]]],
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_axis: str,
    y_axis: str,
) -> Figure:
    """Points, and lines beside them, on logarithmic axes.

    Args:
        points, lines: x and y, both positive, by name.
    """

    def draw(axes: Axes) -> None:
        for index, (name, of_line) in enumerate(lines.items()):
            axes.plot(*zip(*of_line, strict=True), "-:"[index % 2], label=name, color=_INK, linewidth=1.0)
        for index, (name, of_points) in enumerate(points.items()):
            axes.plot(*zip(*of_points, strict=True), _MARKS[index][0], label=name, color=_SERIES[index], markersize=4)
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("log")
            axis.set_major_formatter("{x:g}")  # plain numbers, as text is not parsed for powers
            axis.set_minor_formatter("")
        axes.set_xlabel(x_axis)
        axes.set_ylabel(y_axis)

    told = "; ".join(
        f"{name} {len(of_points)} points, from {_short(min(y for _, y in of_points))} to "
        f"{_short(max(y for _, y in of_points))}"
        for name, of_points in points.items()
    )
    return _figure(heading, draw, True, f"{y_axis} by {x_axis}. {told}; lines: {', '.join(lines)}.", 4.0)


def require_matplotlib() -> None:
    """Raises ImportError, with the remedy, where charts cannot be drawn; ask before long work that ends in one."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install escort-sparse[demo]") from error


def write_svg(path: Path, figure: Figure) -> None:
    """Write the plot as a file of its own, on white."""
    svg = figure.markup("background: #fff").replace("currentColor", "#1b1f24").replace("var(--rule)", "#d5dae0")
    path.write_text(svg, encoding="utf-8")


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
    import matplotlib.figure

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
        canvas = matplotlib.figure.Figure(figsize=(6.8, height), layout="constrained")
        axes = canvas.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        if legend:
            longest = max(len(str(text)) for text in axes.get_legend_handles_labels()[1])
            columns = max(1, min(len(_SERIES), _LEGEND // (longest + 6)))
            canvas.legend(loc="outside upper left", ncols=columns, frameon=False)
        buffer = StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)  # the page scales it by its viewBox
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)  # axes_1 and the like would repeat in the next figure
    return Figure(heading, svg.replace(_INK, "currentColor").replace(_RULE, "var(--rule)"), description)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
