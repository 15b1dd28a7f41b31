"""The least time a network can take on a device when every layer is one kernel.

Each layer takes the longer of two times: its operations at the device's matrix rate, and its bytes at the device's
memory bandwidth, where every tensor the layer must touch is moved once (Williams et al., "Roofline", CACM 2009).
A layer is a convolution with its batch norm, shortcut and ReLU, a pooling, or the head. Lateral convolutions write into
the buffer that the slow pathway reads, so concatenation costs nothing. Fusing across layers can beat this floor, and
other ways to run the network have higher ones: `plans` has them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slowfast_ext.engine import Ceilings
from slowfast_ext.models import BasicBlock3d, Bottleneck3d, Lateral, ResNet3dPathway


@dataclass
class Kernel:
    """Work of one pass: multiply-accumulates and bytes of device memory."""

    name: str
    macs: int
    bytes: int


@dataclass
class Layer(Kernel):
    """A layer as one kernel, with what has to be known to run it otherwise.

    Attributes:
        name: of the convolution, the pooling or the head.
        inputs: shapes; of a lateral connection and of the head slow and fast.
        output: shape; of a lateral connection that of its convolution.
        parameters: number of weights.
        itemsize: bytes an element.
        norm, residual, relu: what follows the convolution, in this order.
        joined: elements of the concatenation that the output becomes a part of.
    """

    inputs: tuple[torch.Size, ...]
    output: torch.Size
    parameters: int
    itemsize: int
    norm: bool = False
    residual: bool = False
    relu: bool = False
    joined: int = 0

    @property
    def written(self) -> int:
        """Bytes of the output."""
        return self.itemsize * self.output.numel()

    def bare(self) -> Kernel:
        """Without what follows the convolution."""
        return Kernel(self.name, self.macs, self.bytes - self.residual * self.written)


@dataclass
class Block(Kernel):
    """Consecutive layers as one kernel that reads their input and weights and writes their output.

    Attributes:
        name: of the module that has them, of a stem that of its pathway.
        kind: ``fast_bottleneck``; ``stem``, a pathway's first convolution and its pooling; ``slow_bottleneck``, one of
            the slow pathway's first stage.
    """

    kind: str
    layers: list[Layer]


def floor_milliseconds(ceilings: Ceilings, kernels: Sequence[Kernel]) -> float:
    """One kernel after the other."""
    return 1e3 * sum(
        max(2 * kernel.macs / ceilings.operations, kernel.bytes / ceilings.bandwidth) for kernel in kernels
    )


def compute_milliseconds(ceilings: Ceilings, kernels: Sequence[Kernel]) -> float:
    """Operations alone."""
    return 1e3 * sum(2 * kernel.macs for kernel in kernels) / ceilings.operations


def overlap_milliseconds(ceilings: Ceilings, kernels: Sequence[Kernel]) -> float:
    """All operations beside all transfers."""
    seconds = sum(kernel.bytes for kernel in kernels) / ceilings.bandwidth
    return max(compute_milliseconds(ceilings, kernels), 1e3 * seconds)


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
            elements = round(x.numel() * read + output.numel() + module.weight.numel())
            owner = model.get_submodule(name.rpartition(".")[0])
            follows = {"norm": owner.bn is not None, "relu": owner.relu}
            record(name, macs, elements, inputs, output, module.weight.numel(), **follows)

        return hook

    def record(name, macs, elements, inputs, output, parameters, **follows):
        shapes = tuple(tensor.shape for tensor in inputs)
        layers.append(Layer(name, macs, size * elements, shapes, output.shape, parameters, size, **follows))

    def pooling(name):
        def hook(module, inputs, output):
            record(name, 0, inputs[0].numel() + output.numel(), inputs, output, 0)

        return hook

    def lateral(module, inputs, output):
        layers[-1].inputs = tuple(tensor.shape for tensor in inputs)
        layers[-1].joined = output.numel()

    def head(name):
        def hook(module, inputs, output):
            (features,) = inputs
            parameters = sum(parameter.numel() for parameter in module.parameters())
            elements = sum(feature.numel() for feature in features) + parameters + output.numel()
            macs = output.shape[0] * module.fc_cls.weight.numel()
            record(name, macs, elements, features, output, parameters)

        return hook

    def shortcut(module, inputs, output):
        layers[-1].bytes += size * output.numel()  # the block's last convolution also reads what it adds
        layers[-1].residual = layers[-1].relu = True

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv3d):
            handles.append(module.register_forward_hook(convolution(name)))
        elif isinstance(module, nn.MaxPool3d):
            handles.append(module.register_forward_hook(pooling(name)))
        elif isinstance(module, (BasicBlock3d, Bottleneck3d)):
            handles.append(module.register_forward_hook(shortcut))
        elif isinstance(module, Lateral):
            handles.append(module.register_forward_hook(lateral))
        elif module is model.head:
            handles.append(module.register_forward_hook(head(name)))
    try:
        with torch.inference_mode():
            model(clip.to(next(model.parameters()).dtype))
    finally:
        for handle in handles:
            handle.remove()
    return layers


def fused_blocks(model: nn.Module, layers: list[Layer]) -> list[Block]:
    """What could be one kernel each, of the layers that `count_layers` found in ``model``.

    Bottlenecks of the fast pathway and of the slow one's first stage, and the stem with its pooling in both.
    """
    blocks = []
    for name, module in model.named_modules():
        if isinstance(module, ResNet3dPathway):
            kind, parts = "stem", f"{name}.conv1."
        elif isinstance(module, Bottleneck3d) and name.startswith("backbone.fast_path."):
            kind, parts = "fast_bottleneck", f"{name}."
        elif isinstance(module, Bottleneck3d) and name.startswith("backbone.slow_path.layer1."):
            kind, parts = "slow_bottleneck", f"{name}."
        else:
            continue
        inner = [layer for layer in layers if layer.name.startswith(parts)]
        elements = inner[0].inputs[0].numel() + inner[-1].output.numel() + sum(layer.parameters for layer in inner)
        macs = sum(layer.macs for layer in inner)
        blocks.append(Block(name, macs, inner[0].itemsize * elements, kind, inner))
    return blocks


def plans(layers: list[Layer], blocks: list[Block]) -> dict[str, list[Kernel]]:
    """The kernels of several ways to run the network, by the name of the way; `PLANS` describes them."""

    def passes(layer, *sizes):
        return [layer.bare(), *(Kernel(layer.name, 0, size) for size in sizes if size)]

    def eager(layer):
        y, join = layer.written, 2 * layer.itemsize * layer.joined
        return passes(layer, layer.norm * 2 * y, layer.residual * 3 * y, layer.relu * 2 * y, join)

    def compiled(layer):
        y, join = layer.written, 2 * layer.itemsize * layer.joined
        return passes(layer, (layer.norm or layer.relu or layer.residual) * (2 + layer.residual) * y, join)

    def joined(layer):
        return [layer, *passes(layer, 2 * layer.itemsize * layer.joined)[1:]]

    def with_blocks(*kinds):
        chosen = [block for block in blocks if block.kind in kinds]
        inside = {layer.name for block in chosen for layer in block.layers}
        return [*chosen, *(layer for layer in layers if layer.name not in inside)]

    return {
        "eager": [kernel for layer in layers for kernel in eager(layer)],
        "compiled": [kernel for layer in layers for kernel in compiled(layer)],
        "cudnn": [kernel for layer in layers for kernel in joined(layer)],
        "layers": list(layers),
        "fast_blocks": with_blocks("fast_bottleneck"),
        "stems": with_blocks("fast_bottleneck", "stem"),
        "slow_blocks": with_blocks("fast_bottleneck", "stem", "slow_bottleneck"),
    }


PLANS = {
    "eager": "convolution, batch norm, addition, ReLU and concatenation one pass each",
    "compiled": "what follows a convolution in one pass, concatenation in another",
    "cudnn": "each layer one kernel, concatenation a pass",
    "layers": "each layer one kernel",
    "fast_blocks": "and each bottleneck of the fast pathway",
    "stems": "and each stem with its pooling",
    "slow_blocks": "and each bottleneck of the slow pathway's first stage",
}
