"""What a conversion results in: a network that runs as planned, and the plan."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from escort.cuda.capture import runs
from escort.layers import SparseConv2d
from escort.layers.observed import is_observed
from escort.network import mixing
from escort.network.example import Example, is_shape
from escort.network.memory import keep_freed_memory
from escort.network.plan import NetworkPlan
from escort.network.tracing.state import unchanged
from escort.network.values import tensors_of
from escort.runtime import Graphs, Program, how_calls_run, not_capturable, programs_in
from escort.runtime.saved.builders import is_own
from escort.runtime.stand_in import plain_attributes


class ConvertedModel(nn.Module):
    """A drop-in for the model it was made from. Inference only.

    It takes what that model takes, by the same names, and has its plain attributes and its modules' names. It stays on
    the type of device and in the precision that it was planned for: convert the model again for another. Within a model
    in training it stays frozen and in eval mode, as a frozen batch norm does.

    Args:
        original: what it stands for; without it, it takes what `network` takes.

    Attributes:
        network: what runs; a program where the model could be traced, else the model with swapped layers.
        plan: what was chosen per layer and why.
        graphs: the CUDA graphs that calls on a GPU replay.
        save_pretrained, push_to_hub: methods, see :mod:`escort.integrations.hub`, which adds them.
    """

    save_pretrained: ClassVar[Callable[..., str | None]]
    push_to_hub: ClassVar[Callable[..., str]]

    def __init__(self, network: nn.Module, plan: NetworkPlan, original: nn.Module | None = None) -> None:
        super().__init__()
        if plan.device == "cpu":
            keep_freed_memory()
        self.network = network.requires_grad_(False)
        self._plan_graphs(plan, Graphs(mixing.mixing))
        self._missing: frozenset[str] = frozenset()
        if original is not None:
            signature = inspect.signature(original.forward)
            self.__class__ = _class_that_takes(signature)
            plain = plain_attributes(original)
            for name in plain.keys() - set(dir(ConvertedModel)) - {"network", "plan", "graphs", "training"}:
                self.__dict__[name] = plain[name]
            names = frozenset(dir(type(original))) - frozenset(dir(nn.Module)) - plain.keys()
            self._missing = names | original._modules.keys()  # of modules, those that were fused away
        super().train(False)

    def _plan_graphs(self, plan: NetworkPlan, graphs: Graphs) -> None:
        """Takes a plan, and says in it how calls run: whether they replay graphs, which are made as these are."""
        for program in programs_in(self.network):
            program.native.batching = plan.batching
            program.bind_anew()
        is_on_gpu = not plan.device.startswith("cpu")
        self.plan = replace(plan, **how_calls_run(self.network, is_on_gpu=is_on_gpu))
        self.graphs = copy.copy(graphs)
        self._may_replay = is_on_gpu

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if self._may_replay and not is_observed():
            return self.graphs.call(self._modules["network"], self._run, inputs, named)  # type: ignore[arg-type]
        return self._run(*inputs, **named)

    def _run(self, *inputs: Any, **named: Any) -> Any:
        """A call, step by step."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors_of((inputs, named))):
            raise RuntimeError(
                "a converted model has no gradient, and its input needs one: detach the input, or call the model under "
                "torch.no_grad()"
            )
        return self.network(*inputs, **named)

    def counters(self) -> dict[str, dict[str, int]]:
        """What its layers did besides their plans: the layers of which there is something, by what, how often.

        Counted are input sizes that were not planned and had to be laid out, methods and configs in the place of the
        planned ones with the reason, calls as an operator of torch (see the guide, "Profile"), and residuals that were
        broadcast behind a layer. Copies start anew. What was compiled or exported has no layers, and counts nothing.
        """
        layers = {name: layer for name, layer in self.network.named_modules() if isinstance(layer, SparseConv2d)}
        return {name: counts for name, layer in layers.items() if (counts := layer.counters())}

    def with_network(self, network: nn.Module, plan: NetworkPlan) -> ConvertedModel:
        """The same drop-in by another network and plan."""
        other = copy.copy(self)
        other.__dict__ = {**self.__dict__, "_modules": {}, "plan": plan}
        other.network = network.requires_grad_(False)
        other._plan_graphs(plan, self.graphs)
        return other

    def warmup(self, inputs: Iterable[Any]) -> None:
        """Does for each of these inputs what its first calls would do: lays out tables, captures a CUDA graph.

        It serves calls on the current stream; where a capture fails, `graphs.stats()` says why. A state stays. It also
        runs each step in the calling thread, for which libraries make handles and choose algorithms then: a thread
        that captures the network in a CUDA graph of its own has to call it before.

        Args:
            inputs: each is what the network is called with, as :func:`escort.convert` takes it; or a shape, where the
                network has one input, for zeros of that shape in the type of the example.

        Raises:
            ValueError: for a shape where the network takes other things than one tensor.
            TypeError: for one shape or one input instead of several.
        """
        if isinstance(inputs, torch.Tensor) or is_shape(inputs) or not isinstance(inputs, Iterable):
            raise TypeError("warmup takes several inputs or shapes; pass a list of them, of one alone too")
        with torch.no_grad(), unchanged(self.network) if not_capturable(self.network) else nullcontext():
            for example in map(self._example, inputs):
                with runs if self._may_replay else nullcontext():
                    example.run(self._run)  # type: ignore[arg-type]
                if self._may_replay:
                    self.graphs.capture(self.network, example.args, dict(example.kwargs))

    def _example(self, given: Any) -> Example:
        """What a network is warmed up with."""
        if not is_shape(given):
            return Example.of(given)
        if self.plan.packed_inputs or len(self.plan.input_shapes) != 1 or self.plan.input_names:
            raise ValueError(f"the shape {tuple(given)} does not say what the network takes; pass inputs instead")
        device = next(itertools.chain(self.network.parameters(), self.network.buffers())).device
        return Example.of(torch.zeros(tuple(given), dtype=self.plan.input_types[0], device=device))

    @property
    def traced(self) -> bool:
        """Whether the whole network is one program and runs no code of the model: its file is loaded without one."""
        network = self.network
        if not isinstance(network, Program):
            return False
        return not any(is_own(network.get_submodule(s.target)) for s in network.listing.steps if s.kind == "layer")

    def __getitem__(self, index: Any) -> Any:
        return self.network[index]  # type: ignore[index]

    __iter__ = None  # or Python would ask for numbers until one is not there

    def __getattr__(self, name: str) -> Any:
        network = self.__dict__.get("_modules", {}).get("network")
        if name == "network" or network is None:
            return super().__getattr__(name)
        if name in network._modules:
            return network._modules[name]
        if name in self.__dict__.get("_missing", ()):
            raise AttributeError(
                f"a converted model has no {name}: of the original it keeps forward, plain attributes, and modules but "
                f"for those that were fused into others; use {name} of the original, or convert a module whose forward "
                "it is"
            )
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        signature = getattr(type(self), "_signature", None)
        return (_new, (signature,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module. Raises RuntimeError for the state of another model, such as the original's."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise RuntimeError(
                f"a converted model takes the state of one that was converted alike; load another into the original, "
                f"and convert that again: {error}"
            ) from error

    def train(self, mode: bool = True) -> ConvertedModel:
        """Changes nothing: it stays in eval mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ConvertedModel:
        if requires_grad:
            raise RuntimeError("a converted model is frozen: fine-tune the original, then convert it again")
        return self

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> ConvertedModel:
        for module in self.modules():  # all of them first: what is refused has changed nothing
            if isinstance(module, SparseConv2d):
                module.check_move(fn)
        super()._apply(fn, recurse)
        self.graphs.clear()
        return self


def _class_that_takes(signature: inspect.Signature) -> type[ConvertedModel]:
    """A class of converted models with the arguments of an original, which torch.export and editors read."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    signature = inspect.Signature(parameters)

    def forward(self: ConvertedModel, *inputs: Any, **named: Any) -> Any:
        return ConvertedModel.forward(self, *inputs, **named)

    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[me, *parameters])  # type: ignore[attr-defined]
    return type(
        "ConvertedModel", (ConvertedModel,), {"forward": forward, "_signature": signature, "__module__": __name__}
    )


def _new(signature: inspect.Signature | None) -> ConvertedModel:
    cls = ConvertedModel if signature is None else _class_that_takes(signature)
    return cls.__new__(cls)
