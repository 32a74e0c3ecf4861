"""Tables of forecasts: what pruning gains by the share of zeros, and how far off that was."""

from __future__ import annotations

from benchmarks.exhibits.cells import times_faster
from benchmarks.findings.forecasts import LEAST_GAIN, checks, errors
from benchmarks.result_files import Result
from escort.report import Table


def forecast_table(result: Result) -> Table:
    """Forecast against measured speed-ups of networks that were pruned otherwise."""
    found = checks(result.rows)
    rows = tuple(
        (
            check.network,
            check.weights,
            f"{check.zeros:.0%}",
            times_faster(check.forecast),
            times_faster(check.measured),
            f"{check.error:+.0%}" if check.counts else "-",
        )
        for check in found
    )
    caption = ""
    if any(check.counts for check in found):
        middle, worst = errors(found)
        caption = (
            f"Of the speed-ups from {LEAST_GAIN}x on the median error is {middle:.0%}, the worst {worst:.0%}. Forecast "
            "from random weights pruned alike in all layers; measured with weights of another seed, zeros spread in "
            "another way, or patterns of trained networks."
        )
    return Table("Forecasts", ("Network", "Pruned", "Zeros", "Forecast", "Measured", "Error"), rows, caption)


def network_forecast_table(result: Result, only: str | None = None) -> Table:
    """What each network gains by the share of zeros, all layers alike; `only` one of them."""
    shares = list(dict.fromkeys(row.weights for row in result.rows if row.weights[0] == "0"))
    lines = []
    for network in dict.fromkeys(row.network for row in result.rows if only in (None, row.network)):
        rows = {row.weights: row for row in result.rows if row.network == network and row.method == "forecast"}
        if not rows:
            continue
        about = rows[shares[0]].config
        gains = (times_faster(max(about["dense_us"] / rows[share].time_us, 1.0)) for share in shares)
        ends = (_percent(about["wins_from"], "never"), _percent(about["knee"], "beyond 96%"))
        lines.append((network, f"{about['dense_us'] / 1000:.1f}", *gains, *ends, f"{about['seconds']:.0f}"))
    columns = ("Network", "Now, ms", *(f"{float(share):.0%}" for share in shares), "Wins from", "Levels off", "Took, s")
    caption = (
        "Forecast speed-ups over the original in torch by the share of zeros. Levels off: from there on half as many "
        "nonzeros again gain less than 1.2 times."
    )
    return Table("Forecasts by sparsity", columns, tuple(lines), caption)


def _percent(share: float | None, none: str) -> str:
    return none if share is None else "below 50%" if share == 0.5 else f"{share:.0%}"
