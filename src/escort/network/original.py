"""The model that a user passes: taken out of its wrappers, and copied with plain weights, and not run itself."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from escort.methods.precision import float32_convolutions, float32_products
from escort.network.example import Example
from escort.network.tracing.state import State, same_draws
from escort.network.values import largest_error, tensors_of
from escort.problem import Precision
from escort.runtime.stand_in import runs_more

#: How far two runs of one model on one input may be apart, relatively, by the order of sums alone.
_SAME_RUN = 1e-2
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
#: The module that NNCF puts into a model, with what its weights pass through in each call.
_NNCF = "__nncf_hooks"


def _passes_on(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module that only calls the one inside of it, as those of averaged weights do."""
    return self.module(*args, **kwargs)


def _is_wrapper(model: Any) -> bool:
    """Whether a module's forward is `_passes_on`, whatever the module inside is called."""
    code = getattr(inspect.getattr_static(type(model), "forward"), "__code__", None)
    expected = _passes_on.__code__
    if code is None or runs_more(model) or len(model._modules) != 1 or [*code.co_names] != [*model._modules]:
        return False
    stars = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    return code.co_code == expected.co_code and code.co_argcount == 1 and code.co_flags & stars == stars


def unwrap(model: Any) -> nn.Module:
    """The model inside of ``torch.compile``, data parallelism, averaged weights or an exported program.

    Raises:
        TypeError: for what is no model that can be converted, with the remedy.
    """
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        return unwrap(model._orig_mod)
    if isinstance(model, _WRAPPERS):
        return unwrap(model.module)
    if isinstance(model, nn.Module) and _is_wrapper(model):
        return unwrap(*model.children())
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("convert takes a model in Python, and this one is TorchScript; pass the model it was made from")
    if not isinstance(model, nn.Module):
        remedy = "pass what it returns"
        if not callable(model):
            remedy = "a state dict goes into a model by load_state_dict, and what was saved comes from escort.load"
        raise TypeError(f"convert takes an nn.Module, got {type(model).__name__}; {remedy}")
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose weights are plain parameters.

    Pruning masks, parametrizations, weight norm and spectral norm are applied and gone. Forward hooks are the model's
    own, so that they reach whoever registered them.
    """
    memo: dict[int, Any] = {}
    own = set(model.modules())
    for module in own:
        for value in tree_leaves(list(vars(module).values())):
            if isinstance(value, Tensor) and not value.is_leaf:  # deepcopy refuses what was computed
                memo[id(value)] = value.detach().clone()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", hook)
            if owner not in own:
                memo[id(owner)] = owner
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # a class may copy itself by any code
        raise ValueError(
            f"{_what_is_not_copied(model, memo)} cannot be copied, as converting does: {error}; leave it out, or give "
            "its class a __deepcopy__"
        ) from error
    if shared := own & set(copied.modules()):
        name = type(next(iter(shared))).__name__
        raise ValueError(
            f"a copy of the model shares its {name} with it; let its __deepcopy__ copy it, or leave it out"
        )
    copied.eval()  # before parametrizations are read: some update themselves in training
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the older norms, which are only taken away here
        for module in list(copied.modules()):
            _make_plain(module)
    return copied


def _what_is_not_copied(model: nn.Module, memo: dict[int, Any]) -> str:
    """Which module's attribute keeps a model from being copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                copy.deepcopy(value, {**memo, **{id(inner): inner for inner in model.modules()}})
            except Exception:
                where = f"layer {path}" if path else "the model"
                return f"{where}: its attribute {name}, a {type(value).__name__},"
    return "the model"


def _make_plain(module: nn.Module) -> None:
    if _NNCF in module._modules:
        _leave_nncf(module)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
    if parametrize.is_parametrized(module):
        # The parametrized class is shared with the original, so that it must stay as it is.
        values = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))


def _leave_nncf(module: nn.Module) -> None:
    """Takes away what NNCF called a model by, where that does nothing more.

    Raises:
        ValueError: where weights still pass through masks or quantizers.
    """
    hooks: Any = module._modules[_NNCF]
    if not hooks.is_empty():
        kinds = {type(hook).__name__ for _, hook in hooks.named_hooks()}
        raise ValueError(
            f"NNCF applies {', '.join(sorted(kinds))} to weights of the model in each call; have it write them into "
            "the weights by nncf.strip(model, strip_format=nncf.StripFormat.IN_PLACE), and convert what that returns"
        )
    del module._modules[_NNCF], module.forward, module._replicate_for_data_parallel


@dataclass(frozen=True, eq=False)
class Original:
    """The model that is converted, and what its runs on the example showed.

    Attributes:
        model: a plain copy, in the state that the caller's model is in.
        example: knows whether the model writes to it.
        expected: the tensors that the model makes of it, with torch's draws repeated (:func:`same_draws`).
        state: what the model keeps between its calls, None where no call changes it.
        stateful: the paths of the modules that keep it.
    """

    model: nn.Module
    example: Example
    expected: list[Tensor]
    state: State | None
    stateful: frozenset[str]

    def run_afresh(self, network: nn.Module) -> list[Tensor]:
        """The tensors that a network makes of the example, in the state and with the draws of `expected`."""
        if self.state is not None:
            self.state.restore(network)
        with same_draws():
            output = self.example.run(network)
        return [x.clone() for x in tensors_of(output)]

    def is_computed_by(self, network: nn.Module) -> bool:
        """Whether a network in the same precision makes the same of the example."""
        return largest_error(self.run_afresh(network), self.expected) <= _SAME_RUN

    def rounded(self, precision: Precision) -> list[Tensor]:
        """What the model makes of the example where its convolutions compute in a precision.

        That is `expected`, but for TF32, which the weights' type does not say.
        """
        if precision != "tf32":
            return self.expected
        with float32_convolutions("tf32"):
            return self.run_afresh(copy.deepcopy(self.model))

    def more_exactly(self, precision: Precision) -> list[Tensor] | None:
        """The tensors that the model makes of the example in a type beside whose rounding that of `precision` is large.

        That is float64, which GPUs compute slowly, or float32 for precisions that round thousands of times as coarsely.
        None where the model cannot run so.
        """
        dtype = torch.float64 if precision == "fp32" else torch.float32

        def converted(x: Tensor) -> Tensor:
            return x.detach().to(dtype) if x.is_floating_point() else x.detach().clone()

        try:
            model = copy.deepcopy(self.model).to(dtype)
            args, kwargs = tree_map_only(Tensor, converted, (self.example.args, dict(self.example.kwargs)))
            with float32_convolutions("fp32"), float32_products("fp32"):
                return Original(model, Example(args, kwargs), [], None, self.stateful).run_afresh(model)
        except Exception:  # a model may be written for one type, or the memory be too small
            return None


def run_original(model: nn.Module, example: Example) -> Original:
    """Runs a copy of the model twice.

    Raises:
        ValueError: where it does not run, returns no tensor, or not the same ones in both runs.
    """
    copied = plain_copy(model)
    state = State(copied)
    try:
        with same_draws():
            output, example = example.run_on_copy(copied)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's forward may raise anything
        raise ValueError(
            f"the example {example} does not run through the model, pass what it takes: {error}"
        ) from error
    expected = [x.clone() for x in tensors_of(output)]
    if not expected:
        raise ValueError(
            f"the model returns a {type(output).__name__}, in which no tensor can be found to compare; convert the "
            "part of it that returns tensors"
        )
    _check_some_are_finite(expected)
    changed = state.changed(copied)
    original = Original(
        copied, example, expected, state if changed else None, frozenset(name.rpartition(".")[0] for name in changed)
    )
    if not original.is_computed_by(copied):
        raise ValueError(
            "the model does not compute the same in two runs on the same input, with torch's random numbers repeated; "
            "take out what is random, or convert the part of it that is not"
        )
    if original.state is not None:
        original.state.restore(copied)
    return original


def _check_some_are_finite(outputs: list[Tensor]) -> None:
    """Raises ValueError where outputs hold nothing but NaN and infinities, beside which any other would be right."""
    filled = [x for x in outputs if x.layout is torch.strided and x.numel()]
    if filled and not any(bool(torch.isfinite(x).any()) for x in filled):
        raise ValueError(
            f"of the example the model makes no finite number, in outputs of shape {tuple(filled[0].shape)}, so that "
            "nothing can be judged by it; pass an example as the model gets it, or a model whose type holds its numbers"
        )
