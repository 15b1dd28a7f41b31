"""Blocks and inputs on which twins are compared with the plain blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tolerances import tolerance
from torch import nn

from slowfast_ext.models import BasicBlock3d, Bottleneck3d, ConvBNReLU3d, Lateral


@dataclass(frozen=True)
class BlockCase:
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]


def _case(block, *arguments, shapes, **keywords):
    return BlockCase(lambda: block(*arguments, **keywords), shapes)


CASES = {
    "conv": _case(ConvBNReLU3d, 5, 7, (3, 3, 3), (2, 1, 2), shapes=[(2, 5, 4, 7, 9)]),
    "conv_without_norm": _case(ConvBNReLU3d, 8, 16, (1, 3, 3), norm=False, shapes=[(1, 8, 3, 5, 5)]),
    "conv_without_relu": _case(ConvBNReLU3d, 8, 12, (1, 1, 1), relu=False, shapes=[(1, 8, 3, 5, 5)]),
    "stem": _case(ConvBNReLU3d, 3, 8, (5, 7, 7), (1, 2, 2), shapes=[(1, 3, 6, 15, 13)]),
    "bottleneck": _case(Bottleneck3d, 16, 4, 1, 3, shapes=[(2, 16, 4, 5, 7)]),
    "bottleneck_downsample": _case(Bottleneck3d, 10, 6, 2, 1, shapes=[(1, 10, 2, 7, 5)]),
    "bottleneck_one_frame": _case(Bottleneck3d, 8, 8, 1, 3, shapes=[(1, 8, 1, 3, 3)]),
    "basic": _case(BasicBlock3d, 9, 9, 1, 3, shapes=[(2, 9, 3, 5, 4)]),
    "basic_downsample": _case(BasicBlock3d, 8, 12, 2, 1, shapes=[(1, 8, 2, 7, 7)]),
    "lateral": _case(Lateral, 8, 5, 8, True, shapes=[(1, 16, 2, 5, 3), (1, 8, 16, 5, 3)]),
    "lateral_without_norm": _case(Lateral, 3, 7, 4, False, shapes=[(2, 5, 2, 3, 3), (2, 3, 8, 3, 3)]),
    "lateral_one_frame": _case(Lateral, 2, 5, 4, True, shapes=[(1, 8, 1, 4, 4), (1, 2, 4, 4, 4)]),
    "empty_batch": _case(Bottleneck3d, 8, 4, 2, 1, shapes=[(0, 8, 2, 4, 4)]),
    "lateral_empty_batch": _case(Lateral, 8, 5, 8, True, shapes=[(0, 16, 2, 5, 3), (0, 8, 16, 5, 3)]),
}
LAYOUTS = ("contiguous", "channels_last_3d", "slice")


def lively(module: nn.Module) -> nn.Module:
    """``module`` with parameters and statistics of its batch norms that all matter to the result."""
    with torch.no_grad():
        for bn in module.modules():
            if isinstance(bn, nn.modules.batchnorm._BatchNorm):
                bn.weight.uniform_(0.5, 1.5)
                bn.bias.normal_(0, 0.2)
                bn.running_mean.normal_(0, 0.2)
                bn.running_var.uniform_(0.5, 1.5)
    return module


def build(case: BlockCase, dtype=torch.float32, device="cpu") -> nn.Module:
    return lively(case.build()).to(device, dtype).eval()


def inputs(case: BlockCase, dtype=torch.float32, device="cpu", layout="contiguous", requires_grad=False):
    """Normal numbers; "slice" cuts them out of a larger tensor, so that no stride or offset is the obvious one."""
    tensors = []
    for shape in case.shapes:
        if layout == "slice":
            tensor = torch.randn([size + 3 for size in shape])[tuple(slice(2, size + 2) for size in shape)]
        elif layout == "channels_last_3d":
            tensor = torch.randn(shape).to(memory_format=torch.channels_last_3d)
        else:
            tensor = torch.randn(shape)
        tensors.append(tensor.to(device, dtype, memory_format=torch.preserve_format).requires_grad_(requires_grad))
    return tensors


def block_tolerance(module: nn.Module, dtype: torch.dtype, plain_result: torch.Tensor) -> dict[str, float]:
    """For the results of a network of convolutions and batch norms, computed in two ways.

    A convolution brings at most five roundings: of its folded weights, of the plain path's convolution, normalisation
    and sum, and of the fused result.
    """
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv3d)]
    terms = sum(layer.weight[0].numel() for layer in convolutions)
    scale = plain_result.double().std().item() if plain_result.numel() > 1 else 1.0
    return tolerance(dtype, terms, roundings=5 * len(convolutions), scale=scale)
