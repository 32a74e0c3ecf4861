"""Ctrl-C at any time: nothing of a conversion stays behind, and the next one works."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import rich.live
import torch
from torch import nn
from torch.overrides import _len_torch_function_stack

import escort
from escort.network import convert
from escort.planner import planner
from tests.network.models import Branching, Small, pruned

PACKAGE = str(Path(escort.__file__).parent)
#: At so many points of a run it is interrupted, which are spread over all calls of its functions.
POINTS = 40


class Interrupting:
    """Runs something, and raises KeyboardInterrupt where one of Escort's functions is called, the n-th time.

    Attributes:
        calls: how many calls there were.
        was_seen: whether the interrupt came out of what was run.
    """

    def __init__(self, run: Callable[[], object], at: int = 0) -> None:
        self.calls, self._at, self.was_seen = 0, at, False
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            run()
        except KeyboardInterrupt:
            self.was_seen = True
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> None:
        # What is raised while a generator is thrown away, Python itself swallows.
        if frame.f_code.co_filename.startswith(PACKAGE) and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            self.calls += 1
            if self.calls == self._at:
                raise KeyboardInterrupt


def interrupted_everywhere(run: Callable[[], object], points: int) -> Iterator[None]:
    """Runs something again and again; yields each time that it was interrupted, at points spread over all calls."""
    run()  # what is looked up once is known from here on
    total, seen = Interrupting(run).calls, 0
    for point in range(points):
        one = Interrupting(run, 1 + point * total // points)
        assert one.was_seen or one.calls < 1 + point * total // points, "something swallowed the interrupt"
        if one.was_seen:
            seen += 1
            yield
    assert seen > points / 2


def threads() -> frozenset[threading.Thread]:
    """Those that run, once that of the bar has looked up and found that it ends. Libraries may watch by a daemon."""
    bars = [thread for thread in threading.enumerate() if isinstance(thread, rich.live._RefreshThread)]
    for bar in bars:
        bar.join(2.0)
    return frozenset(thread for thread in threading.enumerate() if not thread.daemon or thread in bars)


def settings() -> dict[str, Any]:
    """What belongs to the process and not to a conversion."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "products": torch.get_float32_matmul_precision(),
        "tf32": (cudnn.allow_tf32, matmul.allow_tf32, cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "precisions": [getattr(each, "fp32_precision", None) for each in (matmul, getattr(cudnn, "conv", None))],
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "stacks": (torch._C._len_torch_dispatch_stack(), _len_torch_function_stack()),
        "cores": torch.get_num_threads(),
        "default": torch.get_default_dtype(),
        "modules": (nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__),
        "numbers": torch.get_rng_state().tolist(),
        "turn": convert._turn._is_owned(),  # type: ignore[attr-defined]
        "gpu": on_gpu() if torch.cuda.is_initialized() else None,
        "trace": torch.compiler.is_compiling() or torch.jit.is_tracing(),
    }


class Before:
    """What belongs to the process, and which threads run, before something is interrupted."""

    def __init__(self) -> None:
        self._settings, self._threads = settings(), threads()

    def is_restored(self) -> bool:
        """Threads of others may have ended meanwhile."""
        return settings() == self._settings and threads() <= self._threads


def on_gpu() -> tuple[Any, ...]:
    stream, numbers = torch.cuda.current_stream(), torch.cuda.get_rng_state().tolist()
    return torch.cuda.current_device(), stream.cuda_stream, torch.cuda.is_current_stream_capturing(), numbers


def look_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a caller's model that a conversion could change."""
    hooks = [name for name in vars(model) if name.endswith("hooks")]
    modules = {path: (type(module), module.training, sorted(vars(module))) for path, module in model.named_modules()}
    registered = {path: [len(getattr(module, name)) for name in hooks] for path, module in model.named_modules()}
    tensors = {name: tensor.tolist() for name, tensor in model.state_dict(keep_vars=True).items()}
    return {"modules": modules, "hooks": registered, "tensors": tensors}


@pytest.fixture
def forgetful() -> None:
    """Every conversion measures anew."""
    planner._remembered.clear()


@pytest.mark.usefixtures("empty_cache", "forgetful")
@pytest.mark.parametrize("model", [Small, Branching])
def test_a_conversion_may_be_interrupted_anywhere(model: Callable[[], nn.Module], tmp_path: Path) -> None:
    network, x = pruned(model()), torch.randn(1, 3, 8, 8)
    before, look = Before(), look_of(network)

    def run() -> escort.ConvertedModel:
        planner._remembered.clear()
        return escort.convert(network, x, progress=True)

    for _ in interrupted_everywhere(run, POINTS):
        assert before.is_restored() and look_of(network) == look
    assert not list(tmp_path.rglob("*.part"))
    with torch.no_grad():
        assert torch.allclose(run()(x), network(x), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_conversion_on_a_gpu_may_be_interrupted_anywhere(dtype: torch.dtype) -> None:
    network, x = pruned(Small()).to("cuda", dtype), torch.randn(1, 3, 8, 8, device="cuda", dtype=dtype)
    precision = "tf32" if dtype is torch.float32 else "fp16"

    def run() -> escort.ConvertedModel:
        planner._remembered.clear()
        return escort.convert(network, x, precision=precision)

    run()
    before, look = Before(), look_of(network)
    for _ in interrupted_everywhere(run, 12):
        assert before.is_restored() and look_of(network) == look
    with torch.no_grad():
        assert torch.allclose(run()(x), network(x), atol=1e-2)


@pytest.mark.usefixtures("always_faster", "forgetful")
def test_planning_anew_may_be_interrupted_anywhere() -> None:
    network, x = pruned(Small()), torch.randn(1, 3, 8, 8)
    fast = escort.convert(network, x)
    before, y = Before(), fast(x)
    for _ in interrupted_everywhere(lambda: escort.replan(fast), POINTS // 2):
        assert before.is_restored() and torch.equal(fast(x), y)


@pytest.mark.usefixtures("always_faster")
def test_what_is_saved_while_interrupted_is_the_old_file(tmp_path: Path) -> None:
    fast = escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8))
    path = tmp_path / "model.escort"
    escort.save(fast, path)
    before = path.read_bytes()
    for _ in interrupted_everywhere(lambda: escort.save(fast, path), POINTS):
        assert os.listdir(tmp_path) == ["model.escort"] and path.read_bytes() == before


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_no_file_is_left_where_writing_is_interrupted(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8))

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        escort.save(fast, tmp_path / "model.escort")
    assert not os.listdir(tmp_path)


CONVERTING = """
import logging, sys, threading, time, torch, escort
from torch import nn
from escort import prune
from escort.planner import planner

torch.manual_seed(0)
model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()))).eval()
prune.uniform(model, 0.9)
prune.make_permanent(model)
x, random = torch.randn(2, 32, 40, 40), torch.get_rng_state()

class Lines(logging.StreamHandler):
    def emit(self, record):
        super().emit(record)
        if record.getMessage().startswith(LINE):
            time.sleep(5.0)  # until the signal comes: what is left to do may take less than sending it

logging.basicConfig(level=logging.DEBUG, handlers=[Lines(sys.stdout)], format="%(message)s")
try:
    escort.convert(model, x, progress=True)
except KeyboardInterrupt:
    time.sleep(0.5)  # in which the bar's thread looks up
    left = [thread for thread in threading.enumerate() if not thread.daemon]  # libraries may watch by a daemon
    assert len(left) == 1, left
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in model.modules())
    logging.disable()
    fast = escort.convert(model, x)
    assert torch.allclose(fast(x), model(x), atol=1e-3)
    print("converted after all", flush=True)
"""

COMPILING = """
import threading
from functools import partial
from escort.cuda.compiler import Text, compile_source
from escort.planner.cores import on_all_cores

def kernel(number):
    lines = "".join(f"    x[{i}] = x[{i}] * {number}.5f + {i}.0f;\\n" for i in range(300))
    return Text(f"kernel{number}.cu", 'extern "C" __global__ void run(float* x) {\\n' + lines + "}")

print("compiling", flush=True)
try:
    on_all_cores([partial(compile_source, kernel(number), {}, "sm_90") for number in range(2000)],
                 lambda done, total: done == 3 and print("begun", flush=True))
except KeyboardInterrupt:
    left = [thread for thread in threading.enumerate() if not thread.daemon]  # libraries may watch by a daemon
    assert len(left) == 1, left
    print("ended", flush=True)
"""


def interrupted(code: str, line: str, cache: Path, delay_s: float = 0.0, exits: int = 0) -> tuple[str, float]:
    """What a process prints from the line on at which it gets a SIGINT, and the seconds until it ended."""
    # A process in the background of a shell starts with SIGINT ignored.
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", listens + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ESCORT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    while not (printed := process.stdout.readline()).startswith(line):
        assert printed, process.communicate()[1]
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    begin = time.perf_counter()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == exits, errors
    return output, time.perf_counter() - begin


@pytest.mark.parametrize("line", ["run as it is", "rewritten", "layer 2", "compared"])
def test_a_real_ctrl_c_ends_a_conversion_and_the_next_one_works(line: str, tmp_path: Path) -> None:
    output, _ = interrupted(f"LINE = {line!r}\n{CONVERTING}", line, tmp_path / "cache")
    assert output.endswith("converted after all\n")


def test_a_real_ctrl_c_ends_compiling_soon_and_leaves_whole_files(tmp_path: Path) -> None:
    output, seconds = interrupted(COMPILING, "begun", tmp_path, delay_s=0.2)
    assert output.endswith("ended\n") and seconds < 30.0
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left and not [name for name in left if name.endswith(".part")]


def test_a_real_ctrl_c_ends_a_command_without_a_word_and_without_a_file(tmp_path: Path) -> None:
    words = [
        "escort",
        "convert",
        "tests.cli.named:tiny",
        "--input",
        "2,3,64,64",
        "-o",
        str(tmp_path / "m.escort"),
        "-vv",
    ]
    code = f"import sys; from escort.cli import app; sys.argv, sys.stderr = {words!r}, sys.stdout; app()"
    output, _ = interrupted(code, "checked", tmp_path / "cache", exits=130)  # early: the rest takes a second
    assert "Traceback" not in output and "wrote" not in output and not list(tmp_path.rglob("*escort*"))
