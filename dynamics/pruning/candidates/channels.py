"""What the operations of a traced network do to a channel: keep it separate, end it, or lift its zeros.

``alone``: each channel is processed by itself, and zero stays zero. ``moves``: the channels come to be in another
dimension or part. ``ends``: the channel is mixed with others (by a layer or a sum), or the operation is not known here;
up to it, a silenced channel is zero. ``lifts``: a silenced
channel still has an effect, because zero becomes something else (sigmoid) or divides (1/x), or because other channels
are normalised together with it (RMSNorm).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ...network.identities import Layer, identity

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_ALONE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample, nn.Flatten,
)  # fmt: skip
_OWN_PADS = (
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d,
    nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_LIFTS = (
    nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softplus, nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin,
    nn.AlphaDropout, nn.GLU, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.RMSNorm,
)  # fmt: skip
_ALONE_FUNCTIONS: frozenset[Callable] = frozenset({
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.rrelu, F.prelu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish,
    F.hardswish, F.hardtanh, F.tanh, F.softsign, F.tanhshrink, F.softshrink, F.hardshrink, F.dropout, F.dropout1d,
    F.dropout2d, F.dropout3d, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    F.adaptive_max_pool3d, F.interpolate, operator.neg, operator.abs, torch.neg, torch.abs, torch.square, torch.relu,
    torch.relu_, torch.tanh, torch.flatten,
})  # fmt: skip
_LIFTING_FUNCTIONS: frozenset[Callable] = frozenset({
    F.sigmoid, F.hardsigmoid, F.logsigmoid, F.softplus, F.glu, F.softmax, F.log_softmax, F.group_norm, F.layer_norm,
    F.batch_norm, F.instance_norm, torch.sigmoid, torch.softmax, torch.exp, torch.cos, torch.log, torch.rsqrt,
    torch.reciprocal,
})  # fmt: skip
_ALONE_METHODS = (
    "relu", "relu_", "tanh", "neg", "abs", "square", "contiguous", "clone", "flatten", "to", "float", "double", "half",
    "bfloat16",
)  # fmt: skip
_MOVING_FUNCTIONS: frozenset[Callable] = frozenset({
    torch.permute, torch.transpose, torch.swapaxes, torch.movedim, torch.reshape, torch.squeeze, torch.unsqueeze,
    torch.unflatten, torch.chunk, torch.split, operator.getitem,
})  # fmt: skip
_MOVING_METHODS = (
    "permute", "transpose", "swapaxes", "movedim", "view", "reshape", "squeeze", "unsqueeze", "unflatten", "chunk",
    "split",
)  # fmt: skip
_LIFTING_METHODS = ("sigmoid", "softmax", "exp", "log", "rsqrt", "reciprocal")
_FUNCTIONS = _ALONE_FUNCTIONS, _MOVING_FUNCTIONS, _LIFTING_FUNCTIONS
_METHODS = _ALONE_METHODS, _MOVING_METHODS, _LIFTING_METHODS
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
_QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, torch.divide, "div", "div_", "divide")
_CLAMPS = (torch.clamp, torch.clip, "clamp", "clamp_", "clip")
_POWERS = (operator.pow, torch.pow, "pow")
_SUMS = (operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_", "sub", "sub_")
_CONVOLUTION_FUNCTIONS = (
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip
_PRODUCTS_OF_MATRICES = (F.linear, F.bilinear, operator.matmul, torch.matmul, torch.mm, "matmul", "mm")


def is_depthwise(module: nn.Module | None) -> bool:
    """Whether a module is a convolution with one filter per channel, even if only one channel is left."""
    if not isinstance(module, CONVOLUTIONS) or not module.groups == module.in_channels == module.out_channels:
        return False
    return identity(module).depthwise


def normalised_by(node: fx.Node, model: nn.Module) -> str | None:
    """Name of the BatchNorm whose own forward method this is part of, where it applies its γ and β; else None."""
    given = _given(node, "running_mean", "running_var", "weight", "bias") if node.target is F.batch_norm else {}
    owners = {one.target.rpartition(".")[0] for key, one in given.items() if key in ("weight", "bias") and _is_own(one)}
    named = [owner for owner in owners if isinstance(model.get_submodule(owner), NORMALISATIONS)]
    return named[0] if len(owners) == len(named) == 1 else None


def _is_own(given: Any) -> bool:
    """Whether an argument is one of the model's own tensors."""
    return isinstance(given, fx.Node) and given.op == "get_attr"


def does(node: fx.Node, module: nn.Module | None) -> str:
    """What an operation that is neither depthwise nor BatchNorm does to a channel, in one of the words above."""
    if isinstance(module, _CONSTANT_PADS):
        return "lifts" if module.value else "alone"
    if isinstance(module, nn.Hardtanh) or node.target is F.hardtanh:
        given = vars(module) if module is not None else _given(node, "min_val", "max_val")
        return "alone" if _is_around_zero(given.get("min_val", -1), given.get("max_val", 1)) else "lifts"
    if node.op == "call_module":
        alone, lifts = isinstance(module, (*_ALONE, *_OWN_PADS)), isinstance(module, _LIFTS)
        moves = isinstance(module, nn.Unflatten)
    else:
        known = _METHODS if node.op == "call_method" else _FUNCTIONS
        alone, moves, lifts = (node.target in operations for operations in known)
    return "alone" if alone else "moves" if moves else "lifts" if lifts else "ends"


def is_layer_of(node: fx.Node, source: fx.Node, weights: Collection[fx.Node], *, flattened: bool) -> bool:
    """Whether an operation is a layer as a function, which mixes the channels of a source by one of these weights.

    The channels are the second dimension; where they are laid out, the last. A matrix on the left mixes samples or
    nodes of a graph, and a convolution with groups may have one filter a channel.
    """
    first, *others = node.all_input_nodes
    if first is not source or source in weights or not any(one in weights for one in others):
        return False
    if node.target in _PRODUCTS_OF_MATRICES:
        return flattened
    given = _given(node, "weight", "bias", "stride", "padding", "dilation", "groups")  # or output_padding
    return node.target in _CONVOLUTION_FUNCTIONS and given.get("groups", 1) == 1


def is_about(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operation asks for a tensor's type, device or shape, and not for its numbers."""
    if node.target in ("to", "type_as"):
        return node.args[0] is not source
    asked = node.args[1] if node.target is getattr else node.target
    return asked in ("dtype", "device", "shape", "ndim", "size", "dim", "numel")


def scales(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operation multiplies, divides, or raises each channel of the source, or clamps it around 0."""
    if node.target in _POWERS:
        exponent = _given(node, "exponent").get("exponent")
        return isinstance(exponent, int | float) and exponent > 0
    if node.target in _CLAMPS:
        ends = _given(node, "min", "max")
        return _is_around_zero(ends.get("min") or 0, ends.get("max") or 0)
    return node.target in _PRODUCTS or (node.target in _QUOTIENTS and not divides_by(node, source))


def divides_by(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operation divides by the source, or raises it to a negative power: a zero becomes infinite or NaN."""
    if node.target in _POWERS:
        exponent = _given(node, "exponent").get("exponent")
        return node.args[:1] == (source,) and isinstance(exponent, int | float) and exponent < 0
    return node.target in _QUOTIENTS and _given(node, "other").get("other") is source


def _is_around_zero(low: Any, high: Any) -> bool:
    """Whether a range is known and contains zero."""
    return all(isinstance(end, int | float) for end in (low, high)) and low <= 0 <= high


def pads(node: fx.Node, layer: Layer) -> bool:
    """Whether an operation pads the pixels of a convolution's channels, by zeros or their own."""
    given = _given(node, "pad", "mode", "value") if node.target is F.pad else {}
    widths = given.get("pad")
    return isinstance(widths, tuple | list) and len(widths) <= 2 * (layer.weight.ndim - 2) and not given.get("value")


def shifts(module: nn.Module | None) -> bool:
    """Whether a layer pads or crops the last dimension, in which a linear layer has its neurons."""
    return isinstance(module, (*_CONSTANT_PADS, *_OWN_PADS)) and any(module.padding[:2])


def pools(node: fx.Node, layer: nn.Module) -> bool:
    """Whether an operation averages the channels of a convolution over all pixels, as ``x.mean((2, 3))`` does."""
    if node.target not in (torch.mean, "mean") or not isinstance(layer, CONVOLUTIONS):
        return False
    over, count = _given(node, "dim", "keepdim").get("dim"), layer.weight.ndim
    dims = over if isinstance(over, tuple | list) else [over]
    return all(isinstance(dim, int) for dim in dims) and {dim % count for dim in dims} == set(range(2, count))


def _given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments given to a function besides its tensor, by name."""
    return dict(zip(names, node.args[1:], strict=False)) | node.kwargs


def flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation flattens a sample's channels into one dimension, as a linear layer reads them."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    if node.target in (torch.mean, "mean"):
        return not _given(node, "dim", "keepdim").get("keepdim", False)
    start = _given(node, "start_dim", "end_dim")
    return node.target in (torch.flatten, "flatten") and (start.get("start_dim"), start.get("end_dim", -1)) == (1, -1)


def is_sum(node: fx.Node) -> bool:
    """Whether an operation adds or subtracts several tensors."""
    return node.target in _SUMS and len(node.all_input_nodes) > 1
