"""Files from another machine or device, and when their layers are measured again."""

from __future__ import annotations

import importlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from escort.artifact import ArtifactError, load, load_plan, save
from escort.network.convert import ConvertedModel, convert
from escort.planner import planner
from escort.planner.machine import Machine
from tests.artifact.forgery import Forgery, on_gpu
from tests.artifact.networks import Residual, X, assert_same, sparse

LOAD = importlib.import_module("escort.artifact.load")  # by that name the package has the function
ELSEWHERE = Machine("another", "none", 99, "2.0", "0")


def planned_on_gpu(saved: Path, path: Path, precision: str) -> Path:
    """The file as if it had been planned on a GPU, with steps that name the device."""
    forgery = Forgery(saved.read_bytes())
    layers = {name: on_gpu(layer, precision) for name, layer in forgery.plan["layers"].items()}
    machine = asdict(Machine("A GPU", "sm_90", 0, "2.13.0", "0", "580.1", "13.0", "9.1.0"))
    forgery.plan |= {"layers": layers, "machine": machine, "device": "cuda:0", "precision": precision, "timer": "graph"}
    steps = forgery.program["steps"]
    steps.append({"call": "Tensor.to", "args": [forgery.program["output"], {"device": "cuda:0"}]})
    steps.append({"call": "Tensor.to", "args": [{"value": len(steps)}, "cuda:0"]})
    forgery.program["output"] = {"value": len(steps)}
    path.write_bytes(forgery.seal())
    return path


def test_another_machine_plans_again(
    converted: ConvertedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {name: replace(plan, machine=ELSEWHERE) for name, plan in converted.plan.layers.items()}
    elsewhere = ConvertedModel(converted.network, replace(converted.plan, layers=layers, machine=ELSEWHERE))
    save(elsewhere, tmp_path / "there")

    kept = load(tmp_path / "there", remeasure=False)
    assert kept.plan.machine == ELSEWHERE
    assert_same(kept, converted)

    here = load(tmp_path / "there")
    assert here.plan.machine == Machine.here()
    assert {plan.machine for plan in here.plan.layers.values()} == {Machine.here()}
    with torch.inference_mode():
        torch.testing.assert_close(here(X), converted(X))

    replanned: list[ConvertedModel] = []
    monkeypatch.setattr(LOAD, "replan", lambda model, **options: replanned.append(model) or model)
    load(tmp_path / "there")
    assert len(replanned) == 1


@pytest.mark.usefixtures("plan_store")
def test_another_machine_takes_over_what_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_remembered", {})
    here = convert(sparse(Residual()), X)
    layers = {name: replace(plan, machine=ELSEWHERE) for name, plan in here.plan.layers.items()}
    save(ConvertedModel(here.network, replace(here.plan, layers=layers, machine=ELSEWHERE)), tmp_path / "there")
    measured: list[str] = []
    measure = planner.measure
    monkeypatch.setattr(planner, "measure", lambda *args: measured.append("a layer") or measure(*args))
    monkeypatch.setattr(planner, "_remembered", {})  # as in another process
    taken = load(tmp_path / "there")
    assert not measured and {plan.machine for plan in taken.plan.layers.values()} == {Machine.here()}
    assert {plan.times_from for plan in taken.plan.layers.values()} == {"plan store"}
    assert taken.plan.machine == Machine.here()
    with torch.inference_mode():
        torch.testing.assert_close(taken(X), here(X))
    load(tmp_path / "there", remeasure=True)
    assert measured


def test_kernels_made_for_the_weights_may_be_made_again(converted: ConvertedModel) -> None:
    assert LOAD._effort(converted.plan) == "fast"
    name, plan = next(iter(converted.plan.layers.items()))
    generated = replace(plan, problem=plan.problem.on("cuda:0"), method="generated")
    assert LOAD._effort(replace(converted.plan, layers=converted.plan.layers | {name: generated})) == "best"


def test_this_machine_plans_again_only_when_asked(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replanned: list[ConvertedModel] = []
    monkeypatch.setattr(LOAD, "replan", lambda model, **options: replanned.append(model) or model)
    load(saved)
    assert not replanned
    load(saved, remeasure=True)
    assert len(replanned) == 1


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_without_a_gpu_its_plan_is_made_anew_on_the_cpu(
    saved: Path, tmp_path: Path, converted: ConvertedModel, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = planned_on_gpu(saved, tmp_path / "gpu", precision)
    for device in (None, "cpu"):
        here = load(path, device=device)
        assert (here.plan.device, here.plan.precision, here.plan.machine) == ("cpu", "fp32", Machine.here())
        assert {(p.problem.device, p.problem.precision) for p in here.plan.layers.values()} == {("cpu", "fp32")}
        assert all(plan.time_us is not None for plan in here.plan.layers.values())
        with torch.inference_mode():
            torch.testing.assert_close(here(X), converted(X))
    assert load_plan(path).layers["stem.0"].method == "cudnn" and load_plan(path).device == "cuda:0"
    with pytest.raises(ArtifactError, match="gpu: it was planned for cuda:0, not for cpu; leave out remeasure=False"):
        load(path, remeasure=False)
    with pytest.raises(ValueError, match="cuda:1 needs an NVIDIA GPU"):
        load(path, device="cuda:1")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_needs_a_gpu(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ArtifactError,
        match=f"gpu: it computes in {precision}, which takes a GPU; load it where there is a GPU, or convert",
    ):
        load(planned_on_gpu(saved, tmp_path / "gpu", precision))


def test_a_plan_is_read_without_the_rest(saved: Path, converted: ConvertedModel, tmp_path: Path) -> None:
    assert load_plan(saved) == converted.plan
    forgery = Forgery(saved.read_bytes())
    forgery.plan["layers"]["stem.0"]["method"] = "magic"
    (tmp_path / "forged").write_bytes(forgery.seal())
    with pytest.raises(ArtifactError, match="forged: not a network plan: layer stem.0: no method 'magic'"):
        load_plan(tmp_path / "forged")
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "none")
