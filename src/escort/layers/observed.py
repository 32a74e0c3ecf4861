"""Whether a call is a plain one, which a layer may serve by a kernel that is handed memory.

What observes or transforms torch's operators must see an operator instead: traces, ``make_fx`` and fake tensors
(modes), ``vmap`` and its like (transforms). It is asked once per call, so each by its fastest function.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

#: The types of tensors that are memory and nothing else, unless they are negated lazily.
PLAIN = frozenset((torch.Tensor, nn.Parameter))

#: A torch for CPUs alone lacks it.
is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
is_compiling, is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
is_profiled, _profiler = torch._C._autograd._profiler_enabled, torch._C._autograd._profiler_type
_KINETO = torch._C._profiler.ActiveProfilerType.KINETO
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_function_modes, _is_autocast = torch._C._len_torch_function_stack, torch.is_autocast_enabled


def is_observed() -> bool:
    """Whether anything but a plain call sees what the layer does."""
    if is_compiling() or is_tracing() or _modes() > 0:
        return True
    return _transforms() is not None or bool(forward_ad._current_level >= 0)


def watched(device_type: str) -> str | None:
    """What wants to see the steps of a network, or to change them: the reason why they are not run as one."""
    if is_profiled():
        return "a profiler watches"
    if _is_autocast(device_type):
        return "autocast is on"
    # That of a default device changes nothing: results are made where the network is.
    if _function_modes() and {type(mode) for mode in _get_current_function_mode_stack()} != {DeviceContext}:
        return "a mode watches"
    return None


def profiled(operator: str, layer: str) -> AbstractContextManager[object]:
    """The range of a layer's call in a profile.

    The ranges of NVTX and ITT have a name alone; torch.profiler adds up what has the same name.
    """
    return torch.profiler.record_function(operator if _profiler() == _KINETO else f"{operator} {layer}", layer)
