"""The machine that a measurement belongs to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from escort.planner import machine
from escort.planner.machine import Machine


def test_a_machine_survives_json() -> None:
    here = Machine.here()
    assert Machine.from_json(here.to_json()) == here
    assert set(here.to_json()) == {"device", "isa", "threads", "torch", "escort"}
    gpu = Machine("NVIDIA H200", "sm_90", 0, "2.11.0", "0.2.0", "580.159.04", "13.0", "9.19.0")
    assert Machine.from_json(gpu.to_json()) == gpu


@pytest.mark.parametrize(
    "change", [{"threads": "2"}, {"device": 3}, {"driver": None}, {"cuda": 13}, {"gpu": "x"}, {"isa": ["avx2"]}]
)
def test_nonsense_is_no_machine(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a machine"):
        Machine.from_json({**Machine.here().to_json(), **change})
    with pytest.raises(ValueError, match="not a machine"):
        Machine.from_json({"device": "a CPU"})


def test_a_gpu_is_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "_driver_version", lambda: "580.159.04")
    gpu = Machine.here("cuda:0")
    assert (gpu.device, gpu.isa, gpu.threads) == ("NVIDIA H200", "sm_90", 0)
    assert (gpu.driver, gpu.cuda, gpu.cudnn) == ("580.159.04", "13.0", "9.10.2")


ARM = """processor\t: 0
BogoMIPS\t: 50.00
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd05

"""


def test_the_name_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    intel = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) @ 2.0GHz\nprocessor\t: 1\nmodel name\t: another\n"
    assert machine._cpu_described(intel) == "Intel(R) Xeon(R) @ 2.0GHz"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    big = ARM.replace("0xd05", "0xd41")
    assert machine._cpu_described(ARM + ARM + big) == "aarch64 0x41:0xd05 0x41:0xd41"
    assert machine._cpu_described(ARM) != machine._cpu_described(big), "plans are measured again on another one"
    assert machine._cpu_described("processor\t: 0\n") is None
