"""The least time a network can take on a device when every layer is one kernel.

Each layer takes the longer of two times: its operations at the device's matrix rate, and its bytes at the device's
memory bandwidth, where every tensor the layer must touch is moved once (Williams et al., "Roofline", CACM 2009).
A layer is a convolution with its batch norm, shortcut and ReLU, a pooling, or the head. Lateral convolutions write into
the buffer that the slow pathway reads, so concatenation costs nothing. Fusing across layers can beat this floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from timing import Summary, time_once
from torch import Tensor, nn

from slowfast_ext.models import BasicBlock3d, Bottleneck3d

GEMM_SIZE = 8192  # large enough that launch and tail are below 1 %
COPY_BYTES = 2**30  # far larger than any cache
CEILING_RUNS = 10


@dataclass
class Layer:
    """Work of one layer: multiply-accumulates and bytes of device memory."""

    name: str
    macs: int
    bytes: int


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device: operations (2 a multiply-accumulate) and bytes moved, a second."""

    operations: float
    bandwidth: float

    def floor_milliseconds(self, layers: list[Layer]) -> float:
        return 1e3 * sum(max(2 * layer.macs / self.operations, layer.bytes / self.bandwidth) for layer in layers)


def count_layers(model: nn.Module, clip: Tensor) -> list[Layer]:
    """The work of each layer of ``model(clip)``, in the order they run.

    Args:
        model: a network of this package in plain PyTorch, on the meta device; ``clip.dtype`` counts, not its own.
        clip (Tensor[N, 3, T, H, W]): on the meta device.
    """
    layers: list[Layer] = []
    handles = []
    size = clip.dtype.itemsize

    def convolution(name):
        def hook(module, inputs, output):
            (x,) = inputs
            # A stride longer than the kernel skips input: a 1x1x1 convolution with stride 2 reads a quarter.
            read = math.prod(
                min(1.0, kernel / stride) for kernel, stride in zip(module.kernel_size, module.stride, strict=True)
            )
            macs = output.numel() * module.weight[0].numel()
            layers.append(Layer(name, macs, size * round(x.numel() * read + output.numel() + module.weight.numel())))

        return hook

    def pooling(name):
        return lambda module, inputs, output: layers.append(Layer(name, 0, size * (inputs[0].numel() + output.numel())))

    def head(name):
        def hook(module, inputs, output):
            (features,) = inputs
            parameters = sum(parameter.numel() for parameter in module.parameters())
            elements = sum(feature.numel() for feature in features) + parameters + output.numel()
            layers.append(Layer(name, output.shape[0] * module.fc_cls.weight.numel(), size * elements))

        return hook

    def shortcut(module, inputs, output):
        layers[-1].bytes += size * output.numel()  # the block's last convolution also reads what it adds

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv3d):
            handles.append(module.register_forward_hook(convolution(name)))
        elif isinstance(module, nn.MaxPool3d):
            handles.append(module.register_forward_hook(pooling(name)))
        elif isinstance(module, (BasicBlock3d, Bottleneck3d)):
            handles.append(module.register_forward_hook(shortcut))
        elif module is model.head:
            handles.append(module.register_forward_hook(head(name)))
    try:
        with torch.inference_mode():
            model(clip.to(next(model.parameters()).dtype))
    finally:
        for handle in handles:
            handle.remove()
    return layers


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A square matrix product through torch, and a copy within device memory (read plus written bytes); medians."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype) for _ in range(2))
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def median_seconds(call):
        for _ in range(3):
            call()
        return Summary.of([time_once(call, device) for _ in range(CEILING_RUNS)]).median / 1e3

    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # the rate that float32 convolutions get
    try:
        operations = 2 * GEMM_SIZE**3 / median_seconds(lambda: torch.mm(a, b))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return Ceilings(operations, 2 * COPY_BYTES / median_seconds(lambda: target.copy_(source)))
