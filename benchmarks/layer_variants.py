"""The ways to run one layer, or one block of them, that are compared, and how each is prepared and checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from roofline import Block, Layer
from torch import Tensor, nn
from variants import WARM_UP_CALLS, Outcome, check_output, first_lines

from slowfast_ext import ops, unavailable_reason
from slowfast_ext.models import Bottleneck3d, ConvBNReLU3d, Lateral, SlowFastHead, Stem

IMPLEMENTATIONS = {
    "eager": "plain modules, channels_last_3d",
    "cudnn": "batch norm folded, aten.cudnn_convolution_relu and _add_relu; without ReLU aten.conv3d with its bias",
    "conv3d_bn_relu": "slowfast_ext.ops.conv3d_bn_relu, a lateral one into its channels of the concatenation",
    "fused": "the operator that slowfast_ext.ops has for this part",
}
# Kind of block, and layers that are no plain convolution, to the operator that computes them in one launch.
OPERATORS = {"fast_bottleneck": "fast_bottleneck", "stem": "stem", "lateral": "lateral_fuse_into", "head": "pool_head"}

# Largest ||output - reference|| / ||reference||, the reference being eager float32 without TF32. Rounding gives up to
# 8e-7, 5e-3 and 6e-4 in R50's layers and bottlenecks.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
TF32_TOLERANCE = TOLERANCE[torch.float16]  # its mantissa is as long
FLUSHED_BYTES = {"cpu": 2**26, "cuda": 2**30}  # far more than the caches hold


def cache_flush(device: torch.device) -> Callable[[], object]:
    """A callable that evicts all else from the device's caches, by reading: what was written would have to be written
    back during the next call. On a GPU it takes longer than the host needs to launch the kernels of a residual block.
    """
    buffer = torch.ones(FLUSHED_BYTES[device.type] // 4, device=device)
    return buffer.sum


def implementations(device: torch.device) -> list[str]:
    """What can be timed on a device."""
    return [name for name in IMPLEMENTATIONS if name != "cudnn" or device.type == "cuda"]


def has_operator(kind: str) -> bool:
    return kind in OPERATORS and hasattr(ops, OPERATORS[kind])


def part_of(model: nn.Module, work: Layer | Block) -> tuple[nn.Module, tuple[torch.Size, ...]]:
    """The module that computes a layer or block of ``model`` (without its addition) and the shapes of its inputs."""
    module = model.get_submodule(work.name)
    if isinstance(work, Block):
        return module.conv1 if work.kind == "stem" else module, work.layers[0].inputs
    if isinstance(module, nn.Conv3d):
        module = model.get_submodule(work.name.rpartition(".")[0])
        if isinstance(module, Stem):  # without its pooling, which is a layer by itself
            conv = module.conv
            module = ConvBNReLU3d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride).to("meta")
    return module, work.inputs + ((work.output,) if work.residual else ())


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return TF32_TOLERANCE
    return TOLERANCE[dtype]


def prepare(
    module: nn.Module, shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Outcome]:
    """Build every implementation of a part, compare its output with the reference, and warm it up.

    Args:
        module, shapes: from :func:`part_of`, on the meta device; the part gets random weights and inputs.
        dtype: of weights and inputs.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode():
        module = _with_random_weights(module, device, generator)
        inputs = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        inputs = [tensor.to(dtype, memory_format=torch.channels_last_3d) for tensor in inputs]
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            reference = _plain(module, *(tensor.float() for tensor in inputs))
        forwards = _forwards(module, inputs, dtype)

    outcomes = {}
    for name in implementations(device):
        if name not in forwards:
            continue
        outcome = outcomes[name] = Outcome()
        if device.type == "cuda" and name in ("conv3d_bn_relu", "fused"):
            outcome.reason = unavailable_reason(device)
            if outcome.reason is not None:
                continue
        call = torch.inference_mode()(forwards[name])
        try:
            if check_output(outcome, call().float(), reference, tolerance(dtype, device)):
                for _ in range(WARM_UP_CALLS if device.type == "cuda" else 1):
                    call()
                outcome.status, outcome.call = "ready", call
        except Exception as error:  # libraries and kernels fail in many ways; the other implementations go on
            outcome.reason = first_lines(error)
    return outcomes


def _with_random_weights(module: nn.Module, device: torch.device, generator: torch.Generator) -> nn.Module:
    """A float32 copy in evaluation mode whose every weight matters."""
    module = copy.deepcopy(module).to_empty(device=device).eval().requires_grad_(False)
    for child in module.modules():
        if isinstance(child, (nn.Conv3d, nn.Linear)):
            child.weight.normal_(std=child.weight[0].numel() ** -0.5, generator=generator)
        if isinstance(child, (nn.BatchNorm3d, nn.Linear)):
            child.bias.normal_(generator=generator)
        if isinstance(child, nn.BatchNorm3d):
            child.weight.uniform_(0.5, 1.5, generator=generator)
            child.running_mean.normal_(generator=generator)
            child.running_var.uniform_(0.5, 1.5, generator=generator)
    return module


def _plain(module: nn.Module, *inputs: Tensor) -> Tensor:
    if isinstance(module, SlowFastHead):
        return module(inputs)
    if isinstance(module, ConvBNReLU3d) and len(inputs) == 2:
        x, shortcut = inputs
        return F.relu(module(x) + shortcut, inplace=True)
    return module(*inputs)


class _Folded:
    """A convolution with its batch norm folded in."""

    def __init__(self, part: nn.Module, dtype: torch.dtype):
        weight, self.bias = ops.fold_batch_norm(part.conv.weight, None, part.bn)
        self.weight = weight.to(dtype, memory_format=torch.channels_last_3d)
        self.rounded_bias = None if self.bias is None else self.bias.to(dtype)
        self.stride, self.padding, self.relu = part.conv.stride, part.conv.padding, part.relu

    def cudnn(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        geometry = (self.stride, self.padding, (1, 1, 1), 1)
        if residual is not None:
            return torch.ops.aten.cudnn_convolution_add_relu(
                x, self.weight, residual, 1.0, self.rounded_bias, *geometry
            )
        if self.relu:
            return torch.ops.aten.cudnn_convolution_relu(x, self.weight, self.rounded_bias, *geometry)
        return F.conv3d(x, self.weight, self.rounded_bias, self.stride, self.padding)

    def ours(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        relu = self.relu or residual is not None
        return ops.conv3d_bn_relu(
            x, self.weight, self.bias, residual, stride=self.stride, padding=self.padding, relu=relu, out=out
        )


def _forwards(module: nn.Module, inputs: list[Tensor], dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """One forward in each implementation that this part has."""
    plain = copy.deepcopy(module).to(dtype=dtype, memory_format=torch.channels_last_3d)
    forwards = {"eager": partial(_plain, plain, *inputs)}
    if isinstance(module, Stem):
        forwards |= _stem(_Folded(module, dtype), module.maxpool, *inputs)
    elif isinstance(module, ConvBNReLU3d):
        folded = _Folded(module, dtype)
        forwards |= {"cudnn": partial(folded.cudnn, *inputs), "conv3d_bn_relu": partial(folded.ours, *inputs)}
    elif isinstance(module, Lateral):
        forwards |= _lateral(_Folded(module, dtype), *inputs)
    elif isinstance(module, Bottleneck3d):
        forwards |= _bottleneck(module, dtype, *inputs)
    elif isinstance(module, SlowFastHead) and has_operator("head"):
        forwards["fused"] = _head(module, plain.fc_cls.weight, *inputs)
    return forwards


def _lateral(folded: _Folded, slow: Tensor, fast: Tensor) -> dict[str, Callable[[], Tensor]]:
    def into_its_channels(convolve):
        # As in a network whose slow layers write into the wider tensor too. Each has its own, which begins as NaN.
        channels = slow.shape[1]
        shape = (slow.shape[0], channels + folded.weight.shape[0], *slow.shape[2:])
        joined = torch.full(shape, torch.nan, dtype=slow.dtype, device=slow.device)
        joined = joined.contiguous(memory_format=torch.channels_last_3d)
        joined[:, :channels] = slow

        def forward():
            convolve(out=joined[:, channels:])
            return joined

        return forward

    forwards = {
        "cudnn": lambda: torch.cat([slow, folded.cudnn(fast)], 1),
        "conv3d_bn_relu": into_its_channels(partial(folded.ours, fast)),
    }
    if has_operator("lateral"):
        options = {"stride": folded.stride[0], "relu": folded.relu}
        forwards["fused"] = into_its_channels(
            partial(ops.lateral_fuse_into, fast, folded.weight, folded.bias, **options)
        )
    return forwards


def _stem(folded: _Folded, pool: nn.MaxPool3d, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    forwards = {"cudnn": lambda: pool(folded.cudnn(x)), "conv3d_bn_relu": lambda: pool(folded.ours(x))}
    if has_operator("stem"):
        forwards["fused"] = partial(ops.stem, x, folded.weight, folded.bias)
    return forwards


def _bottleneck(block: Bottleneck3d, dtype: torch.dtype, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    first, second, last = (_Folded(part, dtype) for part in (block.conv1, block.conv2, block.conv3))
    downsample = None if block.downsample is None else _Folded(block.downsample, dtype)

    def layer_by_layer(convolve):
        shortcut = x if downsample is None else convolve(downsample, x)
        return convolve(last, convolve(second, convolve(first, x)), shortcut)

    forwards = {
        "cudnn": partial(layer_by_layer, _Folded.cudnn),
        "conv3d_bn_relu": partial(layer_by_layer, _Folded.ours),
    }
    if has_operator("fast_bottleneck"):
        tensors = [tensor for folded in (first, second, last) for tensor in (folded.weight, folded.bias)]
        tensors += [None, None] if downsample is None else [downsample.weight, downsample.bias]
        forwards["fused"] = partial(ops.fast_bottleneck, x, *tensors, stride=second.stride[2])
    return forwards


def _head(head: SlowFastHead, weight: Tensor, slow: Tensor, fast: Tensor) -> Callable[[], Tensor]:
    window = None if head.pooling == "global" else head.window
    return partial(
        ops.pool_head,
        slow,
        fast,
        weight,
        head.fc_cls.bias,
        window=window,
        softmax_positions=head.pooling == "sliding_softmax",
    )
