"""escort doctor: what it finds, and what it says about what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from escort import cache
from escort.cli import doctor
from escort.methods import by_name, for_device
from escort.planner import plan_layer, planner, timing
from escort.planner.machine import Machine
from escort.planner.timing import Timing
from tests.cli.invoking import invoke, succeed, succeed_json
from tests.fakes import PROBLEM, a_filter


def test_doctor() -> None:
    report = succeed_json("doctor")
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert report["ok"] and findings["torch"]["value"] == torch.__version__
    assert "NVRTC" in findings["kernel compiler"]["value"]
    assert all(findings[f"method {method.name}"]["value"].startswith("works") for method in for_device("cpu"))
    assert findings["method direct"]["value"] == "works" and "a step of its own" in findings["method dense"]["value"]
    assert "run without Python between them" in findings["native programs"]["value"]
    assert f"kernels for {Machine.here().isa}" in findings["cpu"]["value"]
    assert "remedy" in succeed("doctor").stdout


def test_doctor_finds_a_kernel_that_computes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.reference, "compare", lambda out, ref: 0.5)
    result = invoke("doctor", "--json")
    assert result.exit_code == 1 and not json.loads(result.stdout)["ok"]


def test_doctor_names_the_remedy_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda package: None)
    findings = {finding["name"]: finding for finding in succeed_json("doctor")["findings"]}
    assert findings["onnxruntime"]["remedy"] == "pip install escort-sparse[bench]"


def test_doctor_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / "cache"))

    def missing() -> str:
        raise ImportError("no NVRTC")

    monkeypatch.setattr(doctor.compiler, "compiler_version", missing)
    findings = {finding["name"]: finding for finding in succeed_json("doctor")["findings"]}
    assert findings["gpu"]["ok"] is None and "without CUDA" in findings["gpu"]["value"]
    assert findings["kernel compiler"]["ok"] is None
    assert findings["kernel compiler"]["remedy"] == "pip install escort-sparse[cuda13]"
    assert findings["kernel cache"]["ok"] and not (tmp_path / "cache").exists()


def test_doctor_says_why_the_cache_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    finding = next(finding for finding in succeed_json("doctor")["findings"] if finding["name"] == "kernel cache")
    assert finding["ok"] is None and "ESCORT_CACHE_DIR" in finding["remedy"]


@pytest.mark.usefixtures("plan_store")
def test_doctor_counts_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    def finding() -> tuple[bool | None, str]:
        found = next(finding for finding in doctor.examine() if finding.name == "plan store")
        return found.ok, found.value

    assert finding() == (True, "plans kept: 0, see escort cache")
    planner._remembered.clear()
    plan_layer(PROBLEM, a_filter())
    assert finding() == (True, "plans kept: 1, see escort cache")
    cache.folder().chmod(0o777)
    assert finding() == (None, "not used, as the kernel cache")
    monkeypatch.setenv("ESCORT_KEEP_PLANS", "0")
    assert finding() == (None, "switched off: every process measures all layers")


@pytest.mark.gpu
def test_doctor_runs_the_kernel_of_every_gpu() -> None:
    findings = {finding["name"]: finding for finding in succeed_json("doctor")["findings"]}
    for index in range(torch.cuda.device_count()):
        assert torch.cuda.get_device_name(index) in findings[f"cuda:{index}"]["value"]
        assert findings[f"method direct on cuda:{index}"]["value"] == "works"
        values = [findings[f"method {method.name} on cuda:{index}"]["value"] for method in for_device("cuda")]
        assert all(value == "works" or value.startswith("refuses: ") for value in values)
        assert findings[f"CUDA graphs on cuda:{index}"]["ok"]


@pytest.mark.parametrize(
    ("outcome", "ok", "says"),
    [
        (Timing(3.0), True, "can be captured and replayed"),
        (Timing(3.0, "events", "not captured: too old"), None, "not captured: too old"),
    ],
)
def test_doctor_says_whether_graphs_can_be_captured(
    outcome: Timing, ok: bool | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "race_on_gpu", lambda runs, device, **options: [outcome])
    finding = doctor._graphs("cuda:0")
    assert (finding.ok, finding.value, bool(finding.remedy)) == (ok, says, ok is None)


def test_doctor_says_why_a_gpu_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*args: object, **options: object) -> None:
        raise RuntimeError("the device is lost to this process, start another: fault")

    monkeypatch.setattr(timing, "race_on_gpu", lose)
    finding = doctor._graphs("cuda:0")
    assert finding.ok is False and "start another" in finding.remedy


def test_doctor_counts_the_kernels_that_come_with_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shipped, "FILE", tmp_path / "none")
    assert doctor._shipped_kernels().value.startswith("none: ")
    monkeypatch.setattr(doctor.shipped, "archs", lambda: {"sm_80": 3, "sm_90": 4})
    assert doctor._shipped_kernels().value == "3 for sm_80, 4 for sm_90"


def test_doctor_says_why_a_method_refuses_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing, failing = by_name("lowered"), by_name("direct")

    def fail(*args: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(type(refusing), "unsupported", lambda self, problem: "not on Sundays")
    monkeypatch.setattr(type(failing), "prepare", fail)
    result = invoke("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    refused, failed = (findings[f"method {method.name}"] for method in (refusing, failing))
    assert (refused["ok"], refused["value"]) == (None, "refuses: not on Sundays")
    assert (failed["ok"], failed["remedy"]) == (False, "out of order") and result.exit_code == 1
