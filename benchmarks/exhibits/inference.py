"""The table of the paper's whole networks."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.exhibits.cells import Shown, milliseconds, times_faster
from benchmarks.findings.aims import read_aims
from benchmarks.findings.inference import gains
from benchmarks.result_files import Result
from escort.report import Table

_BY = {
    "cublas": "layers by cuBLAS lowering",
    "cusparse": "layers by cuSPARSE lowering",
    "cudnn": "layers by cuDNN",
    "cudnn_graph": "layers by cuDNN's graphs",
    "graph": "dense, in a CUDA graph",
    "compile": "dense, by `torch.compile`",
}


def show_inference(results: Mapping[str, Result]) -> Shown:
    """Ours against the same networks with their pruned layers by a rival, per precision."""
    aim, shown = read_aims().inference, Shown()
    columns = (
        "Network",
        "Samples",
        "Against",
        "Rival, ms",
        "Ours, ms",
        "Gain",
        "Paper",
        "Cap",
        "Of the cap",
        "Reached",
    )
    caption = (
        "Pruned layers at the paper's sparsities, other convolutions dense. Rival layers stand in the same networks as "
        "ours, each in its fastest config or as torch alone runs it, whichever is faster; CUDA graphs, interleaved. "
        "The cap is the gain if our pruned layers took no time. Aims: at least the paper's gain, and "
        f"{aim.share_of_cap:.0%} of the cap."
    )
    for precision, result in results.items():
        lines = []
        for gain in gains(result.rows):
            reached = {None: "-", True: "yes", False: "no"}[gain.reaches(aim)]
            about = gain.network, str(gain.batch), _BY.get(gain.rival, gain.rival)
            times = milliseconds(gain.rival_us), milliseconds(gain.ours_us), times_faster(gain.ratio)
            cap = times_faster(aim.least.get(gain.rival)), times_faster(gain.cap), f"{gain.share_of_cap:.0%}"
            lines.append((*about, *times, *cap, reached))
        if lines:
            heading = f"The paper's networks whole, {precision}"
            shown[f"inference-{precision}"] = Table(heading, columns, tuple(lines), caption)
    return shown
