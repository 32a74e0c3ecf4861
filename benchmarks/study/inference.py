"""The paper's second question: whole networks, their pruned layers by lowering, by the dense library and by ours."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.ahead import Compilation
from benchmarks.paper_networks import paper_network
from benchmarks.result_files import Item
from benchmarks.study.study import Study
from benchmarks.suite import NetworkRace, Row
from benchmarks.suite.by_method import convert_keeping, run_by, run_free
from benchmarks.suite.networks import Times, Way, dense_ways, log, of_converted, race_in_turn
from benchmarks.suite.rows import leave_out
from escort.methods import Method, for_device
from escort.network.swap import Swapped
from escort.planner import timing
from escort.planner.timing import Timing
from escort.problem import TORCH_DTYPE, MemoryFormat, Precision

#: What rows call the network whose pruned layers take no time.
CAP = "cap"


def race_inference(study: Study, precision: Precision) -> list[Item]:
    """Whole networks with the paper's layers pruned as it published them, and every way to run these layers.

    The networks around the layers are ours: each rival method runs the pruned layers of every network that the
    conversion chose from. Beside them there are the dense model and what torch.compile makes of it, and, as a cap, our
    networks with the pruned layers at no time.
    """
    race = NetworkRace(
        precision=precision, effort=study.effort, rounds=25, budget_s=20 * study.budget_s, ahead=study.ahead
    )

    def measure(name: str) -> list[Row]:
        torch.manual_seed(study.seed)
        torch.compiler.reset()  # it gives up on code that it compiled for too many other models
        model, layers = paper_network(name, study.seed)
        storage = TORCH_DTYPE[precision]
        model = model.to(study.device, storage)
        x = torch.randn(study.samples(name), *study.factories[name].input_size).to(study.device, storage)
        ways = list(_ways(model, x, layers, race, name, study.formats))
        return race_in_turn(ways, model, x, (name, "paper"), race, _by_graphs)

    def compilation(name: str) -> Compilation | None:
        if study.device_type == "cpu":
            return None
        return Compilation(name, study.samples(name), precision, study.device, tuple(study.formats), of_the_paper=True)

    return [
        Item(f"{name} N={study.samples(name)}", partial(measure, name), compilation(name)) for name in study.networks
    ]


def _ways(
    model: nn.Module,
    x: Tensor,
    layers: Sequence[str],
    race: NetworkRace,
    name: str,
    formats: Sequence[MemoryFormat],
) -> Iterator[Way]:
    """All ways to run the network, the converted one first."""
    begin = time.perf_counter()
    with torch.no_grad():
        converted, networks = convert_keeping(model, x, precision=race.precision, effort=race.effort, formats=formats)
        log.info("%s: converted in %.1f s", name, time.perf_counter() - begin)
        yield of_converted(converted, x)
        for network in networks:
            yield from _by_methods(network, x, layers, name)
    if x.is_cuda:
        yield from dense_ways(model, x, formats)
        yield from dense_ways(model, x, formats, compiled=True)
    else:
        yield from dense_ways(model, x)


def _by_methods(swapped: Swapped, x: Tensor, layers: Sequence[str], name: str) -> Iterator[Way]:
    """A network with its pruned layers in no time, and by each method that is a rival of the paper."""
    network = swapped.network
    memory_format = swapped.layers[layers[0]].problem.memory_format
    yield Way(CAP, {"memory_format": memory_format}, partial(run_free(network, layers), x))
    for method in rivals(str(x.device)):
        for variant in ("fastest", "torch"):
            config = {"memory_format": memory_format, "variant": variant}
            begin = time.perf_counter()
            try:
                by_method = run_by(network, layers, method, as_torch=variant == "torch")
            except (ValueError, RuntimeError) as error:  # nor is there memory for everything
                leave_out(f"{name} by {method.name} {config}", str(error))
                continue
            log.info("%s by %s %s: made in %.1f s", name, method.name, config, time.perf_counter() - begin)
            yield Way(method.name, config, partial(by_method, x))


def rivals(device: str) -> list[Method]:
    """The methods that the paper compares with: those that lower the input, and the dense library."""
    return [method for method in for_device(device) if method.lowers or method.is_dense]


def _by_graphs(ways: Sequence[Way], device: torch.device, race: NetworkRace) -> Times:
    """All ways by CUDA graphs; by calls on a CPU."""
    runs, rounds, budget_s = [way.run for way in ways], race.rounds, race.budget_s
    if device.type == "cpu":
        times_us = timing.race(runs, rounds=rounds, budget_s=budget_s)
        return {"call": {index: Timing(time_us, "calls") for index, time_us in enumerate(times_us)}}
    return {"graph": dict(enumerate(timing.race_on_gpu(runs, device, rounds=rounds, budget_s=budget_s)))}
