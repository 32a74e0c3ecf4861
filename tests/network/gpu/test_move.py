"""Converted models on a GPU, moved and saved, loaded elsewhere, and by the command line."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import escort
from escort import reference
from escort.cli import app
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.planner import timing as bench
from escort.planner.machine import Machine
from escort.problem import Precision
from tests.network.gpu.networks import (
    PRECISIONS,
    TWO_GPUS,
    Mixed,
    assert_close,
    assert_same,
    converted,
    each,
    images,
    pruned,
)

pytestmark = pytest.mark.gpu


@each(*PRECISIONS)
def test_saved_and_loaded(precision: Precision, tmp_path: Path) -> None:
    fast, x = converted(precision), images(precision)
    escort.save(fast, tmp_path / "model")
    back = escort.load(tmp_path / "model")
    assert back.plan == fast.plan  # planned on this very machine
    with torch.inference_mode():
        assert_same(back(x), fast(x))
    escort.save(back, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()
    if precision in ("fp16", "bf16"):
        with pytest.raises(ValueError, match=f"it computes in {precision}, which takes a GPU"):
            escort.load(tmp_path / "model", device="cpu")
        return
    here = escort.load(tmp_path / "model", device="cpu")
    assert (here.plan.device, here.plan.precision, here.plan.machine) == ("cpu", "fp32", Machine.here())
    with torch.inference_mode():
        assert reference.compare(here(x.cpu()), fast(x).cpu()) < NETWORK_ERROR_BOUND[precision]


def test_from_the_cpu_to_a_gpu_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "race", lambda runs, **_: [2.0, *(1.0 for _ in runs[1:])])
    model, x = pruned(Mixed()), torch.randn(2, 3, 32, 32)
    escort.save(escort.convert(model, x, effort="best"), tmp_path / "model")
    fast = escort.load(tmp_path / "model", device="cuda")
    assert (fast.plan.device, fast.plan.precision, fast.plan.machine) == ("cuda:0", "fp32", Machine.here("cuda:0"))
    assert_close(fast, model.cuda(), x.cuda(), "fp32")
    with pytest.raises(ValueError, match="there is no cuda:99"):
        escort.load(tmp_path / "model", device="cuda:99")


def test_where_it_may_go_and_what_it_may_become() -> None:
    fast, x = converted("fp16"), images("fp16")
    with torch.inference_mode():
        before = fast(x)
        assert_same(fast.half().cuda().to("cuda:0", torch.float16)(x), before)
        for move, error in ((fast.cpu, ValueError), (fast.float, TypeError), (lambda: fast.to("meta"), ValueError)):
            with pytest.raises(error, match="stem.0 .*(convert the model again|convert it there)"):
                move()
            assert_same(fast(x), before)
        twin = copy.deepcopy(fast)
        twin.load_state_dict(fast.state_dict())
        assert_same(twin(x), before)
        twin.network.get_submodule("pointwise").values.zero_()
        twin.load_state_dict(twin.state_dict())
        assert not torch.equal(twin(x), before)
        assert_same(fast(x), before)
        layer = fast.network.get_submodule("pointwise")
        torch.save(layer, file := io.BytesIO())
        file.seek(0)
        read = torch.load(file, weights_only=False)
        x = images("fp16", 2, 16, 8, 8)
        assert_same(read(x), layer(x))


@TWO_GPUS
def test_from_one_gpu_to_another(tmp_path: Path) -> None:
    fast, x = converted("fp16"), images("fp16")
    with torch.inference_mode():
        expected = fast(x)
        moved = copy.deepcopy(fast).to("cuda:1")
        assert_same(moved(x.to("cuda:1")).to("cuda:0"), expected)
        with pytest.raises(ValueError, match="stem.0 is on cuda:1, its input on cuda:0"):
            moved(x)
        assert_same(fast(x), expected)
        escort.save(moved, tmp_path / "model")
        loaded = escort.load(tmp_path / "model", device="cuda:1", remeasure=False)
        assert loaded.plan.device == "cuda:1"
        assert_same(loaded(x.to("cuda:1")).to("cuda:0"), expected)


def network() -> nn.Module:
    """What the command line converts, the same at every call."""
    torch.manual_seed(0)
    return pruned(Mixed())


def test_the_command_line(tmp_path: Path) -> None:
    def invoke(*args: object) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*(str(arg) for arg in args), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    model, name = tmp_path / "model.escort", "tests.network.gpu.test_move:network"
    report = invoke("convert", name, "--input", "2,3,32,32", "--device", "cuda", "--precision", "fp16", "--output", model)
    assert (report["device"], report["precision"]) == ("cuda:0", "fp16")
    assert invoke("plan", model)["layers"].keys() == report["layers"].keys()
    x = torch.randn(5, 3, 32, 32)

    np.save(tmp_path / "x.npy", x.numpy())
    ran = invoke("run", model, tmp_path / "x.npy", "--output", tmp_path / "y.npz")
    assert ran["device"] == "cuda:0" and ran["inputs"] == 5
    with torch.inference_mode():
        expected = network()(x)
    with np.load(tmp_path / "y.npz", allow_pickle=False) as out:
        assert out["outputs"].dtype == np.float32
        assert reference.compare(torch.from_numpy(out["outputs"]), expected) < NETWORK_ERROR_BOUND["fp16"]
