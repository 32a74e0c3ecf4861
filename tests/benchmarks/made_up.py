"""Rows and results that are made up, and tables as dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.findings.break_even import random_weights
from benchmarks.paper_layers import PAPER_LAYERS
from benchmarks.result_files import Result
from benchmarks.suite import Row
from escort import report
from escort.methods import by_name

HEADER = {
    "device": "cuda",
    "gpu": "a GPU",
    "driver": "580",
    "versions": {"torch": "2.13.0"},
    "date": "2026-11-21",
    "commit": "abc",
    "command": "escort",
}


ON_H200 = {**HEADER, "gpu": "NVIDIA H200", "study": {"seed": 3}}


def row(
    network: str, layer: str, method: str, time_us: float, *, config: Mapping[str, Any] | None = None, **about: Any
) -> Row:
    entry = next((e for e in PAPER_LAYERS if e.network == network), None)
    defaults = {"weights": "paper", "batch": entry.batch if entry else 1, "dtype": "fp32"}
    return Row(
        network=network,
        layer=layer,
        method=method,
        time_us=time_us,
        config=dict(config or {}),
        rel_error=0.0,
        **{**defaults, **about},
    )


GENERATED = by_name("generated", "cuda")
CONFIGS = tuple(GENERATED.config_type(*numbers) for numbers in ((32, 13, 3, 8), (64, 20, 4, 8)))


PLAIN = {"unfold": "by_sample", "product": "by_group"}


def layer_rows(network: str, **times: float) -> list[Row]:
    """Every layer of a network with the same time for each method, and a slower configuration besides."""
    return [
        row(network, entry.layer, method, time_us * slower, config=PLAIN)
        for entry in PAPER_LAYERS
        if entry.network == network
        for method, time_us in times.items()
        for slower in (3.0, 1.0)
    ]


def results(**rows: list[Row]) -> dict[str, Result]:
    return {name.replace("_", "-"): Result(HEADER, records) for name, records in rows.items()}


def cells(table: report.Table) -> list[dict[str, str]]:
    return [dict(zip(table.columns, line, strict=True)) for line in table.rows]


CROSSING_ROWS = [
    row("resnet50", "res2b_branch2b", "cudnn", 30.0, config={"output": "contiguous"}),
    row("resnet50", "res2b_branch2b", "cudnn", 20.0, config={"output": "as_is"}),
]


def curve(network: str, layer: str, ours: str, theirs: str, gains: Mapping[float, float], **about: Any) -> list[Row]:
    return [
        row(network, layer, method, time_us, weights=random_weights(sparsity), **about)
        for sparsity, gain in gains.items()
        for method, time_us in ((ours, 100.0), (theirs, 100.0 * gain))
    ]


def everything() -> dict[str, Result]:
    networks = curve("resnet50", "all", "escort", "eager", {0.7: 0.5, 0.9: 2.0})
    layers = {
        "layers-fp32": Result(ON_H200, [*layer_rows("caffenet", direct=10.0, cublas=60.0), *CROSSING_ROWS]),
        "layers-tf32": Result(ON_H200, layer_rows("caffenet", generated=10.0)),
        "layers-fp16": Result(ON_H200, [*layer_rows("caffenet", direct=10.0, cudnn=5.0), *CROSSING_ROWS]),
    }
    return layers | results(
        ablation_fp32=[row("caffenet", "conv2", "direct", 5.0, config={"words": words}) for words in (7, 1)],
        counters_fp32=[row("caffenet", "conv2", "direct", 5.0, config={"counters": {}})],
        break_even_fp32=curve("resnet50", "res2a_branch2b", "direct", "cudnn", {0.7: 0.5, 0.9: 0.9}),
        networks_fp32=networks,
        networks_tf32=networks,
        networks_fp16=networks,
        breakdown_fp32=[row("caffenet", "conv2", "direct", 5.0, config={"part": "direct"})],
        conversions_fp16=[row("resnet50", "all", "convert", 5e6, config={"caches": "empty", "effort": "fast"})],
        patterns_fp32=[row("resnet50", "conv2d_4", "direct", 5.0, weights="resnet50_magnitude_90", batch=128)],
    )
