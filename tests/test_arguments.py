"""Numbers and paths as callers pass them: what is none is refused alike, wherever it is passed."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import escort
from escort.arguments import is_number, is_whole, path_of
from escort.artifact import export_plans, import_plans, load_plan
from escort.network.forecast.forecast import Forecast
from escort.planner import timing
from escort.planner.machine import Machine


def test_truth_values_are_no_numbers() -> None:
    assert all(is_number(x) for x in (1, 1.5, Fraction(1, 2), np.float32(1), np.int64(1), math.nan))
    assert all(is_whole(x) for x in (1, np.int64(1)))
    assert not any(is_number(x) for x in (True, np.bool_(True), "1", None, 1j, torch.ones(1)))
    assert not any(is_whole(x) for x in (True, np.bool_(True), 1.0, "1", None))


def outlook() -> Forecast:
    machine = Machine("a CPU", "avx2", 2, "2.13.0", "0.1.0")
    return Forecast((), {}, 1.0, 0.0, ((1.0, 1.0), (2.0, 2.0)), (0.5,), 0.0, ((1,),), "fp32", "cpu", machine, 0.0)


@pytest.fixture(scope="module")
def fast() -> escort.ConvertedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "race", lambda runs, **_: [2.0] + [1.0] * (len(runs) - 1))
        return escort.convert(nn.Sequential(nn.Conv2d(2, 2, 1)).eval(), torch.randn(1, 2, 4, 4))


#: What takes a path, and what its message calls that.
TAKERS: dict[str, tuple[Callable[[escort.ConvertedModel, Any], Any], str]] = {
    "save": (escort.save, "path"),
    "save_pretrained": (lambda fast, path: fast.save_pretrained(path), "save_directory"),
    "load": (lambda _, path: escort.load(path), "path"),
    "load_plan": (lambda _, path: load_plan(path), "path"),
    "from_pretrained": (lambda _, path: escort.from_pretrained(path), "pretrained_model_name_or_path"),
    "from_onnx": (lambda _, path: escort.from_onnx(path), "path"),
    "Predictor": (lambda _, path: escort.ray.Predictor(path), "path"),
    "export_plans": (lambda _, path: export_plans(path), "path"),
    "import_plans": (lambda _, path: import_plans(path), "path"),
    "Forecast.write": (lambda _, path: outlook().write(path), "path"),
}


@pytest.mark.parametrize("name", TAKERS)
def test_what_is_no_path_is_refused_alike(
    fast: escort.ConvertedModel, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function, argument = TAKERS[name]
    for given in (None, 5, b"model.escort", ["model.escort"], torch.ones(1)):
        with pytest.raises(TypeError, match=rf"^{argument} is a path, got {type(given).__name__}; pass one such as '"):
            function(fast, given)
    for given in ("", "a\0b"):
        with pytest.raises(ValueError, match=rf"^{argument} is a path, got '.*'; pass one such as '"):
            function(fast, given)
    assert not list(tmp_path.iterdir())


def test_paths_are_texts_or_objects_that_say_one() -> None:
    assert path_of("a/b", "c") == path_of(Path("a/b"), "c") == Path("a/b")


@pytest.mark.parametrize("share", [True, "0.9", None, math.nan, -0.1, 1.5])
def test_shares_of_a_forecast(share: Any) -> None:
    with pytest.raises(ValueError, match="a share of zeros is between 0 and 1, got .*; write 0.9 for 90 %"):
        outlook().time_us(share)
