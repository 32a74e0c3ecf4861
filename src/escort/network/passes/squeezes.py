"""Squeeze-excitation in a network in channels_last: a mean and the two layers behind it, in one launch."""

from __future__ import annotations

from torch import fx, nn

from escort.layers import AdaptiveAvgPool2d, FusedConv2d, Squeeze
from escort.layers.planes.base import Planes
from escort.layers.planes.squeeze import ACTIVATIONS
from escort.network.passes.operations import replace_module, uses_of_paths
from escort.network.tracing.trace import shape_of
from escort.runtime.stand_in import runs_more

#: Why the two layers are not planned.
ONE_LAUNCH = "is computed in one launch with the mean before it, as squeeze-excitation"


def join_squeezes(network: fx.GraphModule) -> None:
    """Replaces such layers in a network, which is written to, where a kernel takes them: paths and tensors stay."""
    uses = uses_of_paths(network)
    for second in list(network.graph.nodes):
        first = _only_input(second)
        mean = None if first is None else _only_input(first)
        if first is None or mean is None or any(uses[node.target] > 1 for node in (mean, first, second)):
            continue
        convs = _pointwise(network, first), _pointwise(network, second)
        pool = network.get_submodule(str(mean.target)) if mean.op == "call_module" else None
        if (
            None in convs
            or type(pool) is not AdaptiveAvgPool2d
            or pool.output_size not in (1, (1, 1))
            or runs_more(pool)
        ):
            continue
        _join(network, mean, first, second)
    network.graph.lint()
    network.recompile()


def _join(network: fx.GraphModule, mean: fx.Node, first: fx.Node, second: fx.Node) -> None:
    path, _, name = str(first.target).rpartition(".")
    other_path, _, other_name = str(second.target).rpartition(".")
    inside = [node for node in network.graph.nodes if str(node.target).startswith(f"{path}.")]
    if not path or path != other_path or {*inside} - {mean, first, second} or runs_more(network.get_submodule(path)):
        return
    fused = [network.get_submodule(str(node.target)) for node in (first, second)]
    assert isinstance(fused[0], FusedConv2d) and isinstance(fused[1], FusedConv2d)
    convs = fused[0].conv, fused[1].conv
    try:
        layer = Squeeze(
            *(convs[0].in_channels, convs[0].out_channels),
            *(fused[0].activation, fused[1].activation),
            (name, other_name),
        )
    except ValueError:  # names that it has itself
        return
    x, weight = mean.args[0], convs[0].weight
    noted = shape_of(x)
    if noted is None or convs[1].out_channels != convs[0].in_channels or noted[1] != weight.dtype:
        return
    planes = Planes(tuple(noted[0]), weight.dtype, weight.device, is_last=True)
    if layer.work(layer.settings(), planes) is None:
        return
    layer._modules.update({name: convs[0], other_name: convs[1]})
    replace_module(network, path, layer.requires_grad_(False).eval())
    second.target, second.args, second.kwargs = path, (x,), {}
    network.graph.erase_node(first)
    network.graph.erase_node(mean)


def _only_input(node: fx.Node) -> fx.Node | None:
    """The layer whose result a layer reads, and nothing else does."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    return source if source.op == "call_module" and len(source.users) == 1 else None


def _pointwise(network: fx.GraphModule, node: fx.Node) -> nn.Conv2d | None:
    """The convolution of one pixel that a node is, with a bias and an activation that the kernel has."""
    fused = network.get_submodule(str(node.target))
    if type(fused) is not FusedConv2d or fused.residual or any(fused.zeros) or fused.unfolded is not None:
        return None
    conv = fused.conv
    is_plain = type(conv) is nn.Conv2d and conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1
    if not is_plain or conv.bias is None or any(map(runs_more, (fused, conv))) or fused.activation not in ACTIVATIONS:
        return None
    return conv if conv.padding in (0, (0, 0), "same", "valid") else None
