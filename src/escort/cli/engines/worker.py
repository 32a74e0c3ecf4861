"""The process of one engine: it loads a network, calls it in a loop of its own, and says how long calls took.

It is run by its path and imports the standard library, numpy and its engine: whatever else were loaded (`import escort`
brings torch) has threads and caches too. The job comes as JSON on the command line, the answer is the last line of
stdout. Its threads run on the cores that the process was given.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from statistics import median
from typing import Any

_WARM_CALLS, _LEAST_CALLS = 3, 3  # that are not timed and that are, at least

Run = Callable[[], Any]
#: What a loader gives: a call, what makes numpy arrays of its result, the package whose version counts, and in what
#: context all that happens.
Loaded = tuple[Run, Callable[[Any], list[Any]], str, AbstractContextManager[Any]]


def torch_module(job: Mapping[str, Any]) -> Loaded:
    """A pickled module of torch with its inputs; with `compile` by torch.compile."""
    import torch

    from escort.network.values import tensors_of

    torch.set_num_threads(job["threads"])
    module, inputs = torch.load(job["model"], weights_only=False)
    if job["is_compiled"]:
        module.compile(dynamic=False)

    def arrays(out: Any) -> list[Any]:
        return [(x.float() if x.dtype is torch.bfloat16 else x).numpy() for x in tensors_of(out)]

    return lambda: module(*inputs), arrays, "torch", torch.inference_mode()


def onnxruntime(job: Mapping[str, Any]) -> Loaded:
    """An ONNX file in ONNX Runtime, with its own pool of threads as it is by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    feed = {source.name: x for source, x in zip(session.get_inputs(), _inputs(job), strict=True)}
    return lambda: session.run(None, feed), list, "onnxruntime", nullcontext()


def openvino(job: Mapping[str, Any]) -> Loaded:
    """An ONNX file in OpenVINO, for short calls and in float32 also where the processor has a faster type."""
    import openvino

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job["threads"],
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = openvino.Core().compile_model(job["model"], "CPU", config)
    request = model.create_infer_request()
    tensors = [openvino.Tensor(x) for x in _inputs(job)]
    for index, tensor in enumerate(tensors):
        request.set_input_tensor(index, tensor)
    outputs = range(len(model.outputs))
    return (
        request.infer,
        lambda out: [request.get_output_tensor(index).data for index in outputs],
        "openvino",
        nullcontext(),
    )


def litert(job: Mapping[str, Any]) -> Loaded:
    """A TFLite file in LiteRT, which computes by XNNPACK. Inputs are laid out in NHWC where the file has them so."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(job["model"], num_threads=job["threads"])
    for detail, x in zip(interpreter.get_input_details(), _inputs(job), strict=True):
        laid_out = x
        if x.ndim == 4 and tuple(detail["shape"][1:]) != x.shape[1:]:
            laid_out = x.transpose(0, 2, 3, 1)
        interpreter.resize_tensor_input(detail["index"], laid_out.shape, strict=True)
        interpreter.allocate_tensors()
        interpreter.set_tensor(detail["index"], laid_out)
    indices = [detail["index"] for detail in interpreter.get_output_details()]
    return (
        interpreter.invoke,
        lambda out: [interpreter.get_tensor(index) for index in indices],
        "ai-edge-litert",
        nullcontext(),
    )


LOADERS: dict[str, Callable[[Mapping[str, Any]], Loaded]] = {
    loader.__name__: loader for loader in (torch_module, onnxruntime, openvino, litert)
}


def _inputs(job: Mapping[str, Any]) -> Sequence[Any]:
    import numpy as np

    with np.load(job["inputs"]) as arrays:
        return [arrays[name] for name in arrays.files]


def _cores(path: str) -> Any:
    """The module that watches the cores, which needs the standard library alone, without the package around it."""
    spec = importlib.util.spec_from_file_location("cores", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def turn(job: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the network, writes its outputs to a file where the job names one, then times calls."""
    cores = _cores(job["cores"])
    run, arrays, package, context = LOADERS[job["loader"]](job)
    with context:
        return {**_timed(job, run, arrays, cores), "version": version(package)}


def _timed(job: Mapping[str, Any], run: Run, arrays: Callable[[Any], list[Any]], cores: Any) -> dict[str, Any]:
    if job["outputs"] is not None:
        import numpy as np

        np.savez(job["outputs"], *arrays(run()))
    begin, warm_calls = time.perf_counter(), 0
    while warm_calls < _WARM_CALLS or time.perf_counter() - begin < job["seconds"] / 2:
        run()
        warm_calls += 1
    seconds: list[float] = []
    watch = cores.Watch()
    begin = time.perf_counter()
    while len(seconds) < _LEAST_CALLS or time.perf_counter() - begin < job["seconds"]:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"time_us": median(seconds) * 1e6, "others": watch.others_share()}


def main() -> None:
    job = json.loads(sys.argv[1])
    try:
        answer = turn(job)
    except Exception as error:  # of many kinds: compilers may be missing, or fail
        answer = {"reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
