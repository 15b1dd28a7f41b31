"""The 3-D ResNet that both pathways are, and the lateral connection between them.

Structure and names follow mmaction2, so that its checkpoints load without renaming: ``layer1.0.conv1.conv.weight``.
Feichtenhofer et al., "SlowFast Networks for Video Recognition" (arXiv 1812.03982), table 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PathwayConfig


class ConvBNReLU3d(nn.Module):
    """``relu(bn(conv(x)))``: a 3-D convolution without bias, padded to keep the size at stride 1.

    Children ``conv`` and ``bn`` (``None`` without ``norm``); ``relu`` says whether the activation is applied, in place.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
        norm: bool = True,
        relu: bool = True,
    ):
        super().__init__()
        padding = tuple(size // 2 for size in kernel_size)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm3d(out_channels) if norm else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, C, T, H, W] -> Tensor[N, K, T', H', W']."""
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return F.relu(x, inplace=True) if self.relu else x

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


class Stem(ConvBNReLU3d):
    """``maxpool(relu(bn(conv(x))))``: the first layer of a pathway, a ``(t, 7, 7)`` convolution and its pooling."""

    def __init__(self, out_channels: int, temporal_kernel: int):
        super().__init__(3, out_channels, (temporal_kernel, 7, 7), (1, 2, 2))
        self.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, 3, T, H, W] -> Tensor[N, out_channels, T, H / 4, W / 4], sizes rounded up."""
        return self.maxpool(ConvBNReLU3d.forward(self, x))  # not super(): a fused twin is no subclass and calls this


class BasicBlock3d(nn.Module):
    """Two ``(t, 3, 3)`` convolutions and a shortcut: ``relu(conv2(conv1(x)) + shortcut(x))``. Depths 18 and 34."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, temporal_kernel: int = 1):
        super().__init__()
        kernel_size = (temporal_kernel, 3, 3)
        self.conv1 = ConvBNReLU3d(in_channels, channels, kernel_size, (1, stride, stride))
        self.conv2 = ConvBNReLU3d(channels, channels, kernel_size, relu=False)
        self.downsample = _shortcut(in_channels, channels, stride)

    @property
    def last_norm(self) -> nn.BatchNorm3d:
        """The batch norm that ends the residual branch."""
        return self.conv2.bn

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, C, T, H, W] -> Tensor[N, channels, T, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv2(self.conv1(x)) + shortcut, inplace=True)


class Bottleneck3d(nn.Module):
    """``relu(conv3(conv2(conv1(x))) + shortcut(x))`` with kernels ``(t, 1, 1)``, ``(1, 3, 3)``, ``(1, 1, 1)``.

    The spatial stride sits on ``conv2``.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1, temporal_kernel: int = 1):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = ConvBNReLU3d(in_channels, channels, (temporal_kernel, 1, 1))
        self.conv2 = ConvBNReLU3d(channels, channels, (1, 3, 3), (1, stride, stride))
        self.conv3 = ConvBNReLU3d(channels, out_channels, (1, 1, 1), relu=False)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    @property
    def last_norm(self) -> nn.BatchNorm3d:
        """The batch norm that ends the residual branch."""
        return self.conv3.bn

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, C, T, H, W] -> Tensor[N, 4 * channels, T, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + shortcut, inplace=True)


class Lateral(nn.Module):
    """Append the time-strided fast features to the slow ones: ``cat([slow, relu(bn(conv(fast)))], 1)``.

    Without ``norm`` there is neither batch norm nor ReLU.

    Args:
        fast_channels: channels C of the fast pathway; 2 C are appended.
        kernel: temporal kernel, odd.
        speed_ratio: temporal stride, frames of the fast pathway over those of the slow one.
        norm: with batch norm and ReLU.
    """

    def __init__(self, fast_channels: int, kernel: int, speed_ratio: int, norm: bool):
        super().__init__()
        stride, padding = (speed_ratio, 1, 1), (kernel // 2, 0, 0)
        self.conv = nn.Conv3d(fast_channels, 2 * fast_channels, (kernel, 1, 1), stride, padding, bias=False)
        self.bn = nn.BatchNorm3d(2 * fast_channels) if norm else None
        self.relu = norm

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        """Tensor[N, Cs, T, H, W], Tensor[N, Cf, speed_ratio * T, H, W] -> Tensor[N, Cs + 2 Cf, T, H, W]."""
        fused = self.conv(fast)
        if self.bn is not None:
            fused = self.bn(fused)
        if self.relu:
            fused = F.relu(fused, inplace=True)
        return torch.cat([slow, fused], 1)

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


class ResNet3dPathway(nn.Module):
    """Stem and four residual stages; :class:`~slowfast_ext.models.SlowFastBackbone` drives two of them.

    Args:
        config: depth, widths and temporal kernels.
        laterals: for the slow pathway its four lateral connections, applied before stage 1 to 4.
    """

    LATERAL_NAMES = ("conv1_lateral", "layer1_lateral", "layer2_lateral", "layer3_lateral")

    def __init__(self, config: PathwayConfig, laterals: Sequence[Lateral] = ()):
        super().__init__()
        self.config = config
        self.conv1 = Stem(config.base_channels, config.stem_temporal_kernel)
        block = BasicBlock3d if config.expansion == 1 else Bottleneck3d
        for stage, kernels in enumerate(config.temporal_kernels):
            in_channels = config.channels[stage] + (laterals[stage].conv.out_channels if laterals else 0)
            channels = config.base_channels * 2**stage
            blocks = [block(in_channels, channels, 1 if stage == 0 else 2, kernels[0])]
            blocks += [block(config.channels[stage + 1], channels, 1, kernel) for kernel in kernels[1:]]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        for name, lateral in zip(self.LATERAL_NAMES, laterals, strict=False):
            self.add_module(name, lateral)

    @property
    def stages(self) -> list[nn.Sequential]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    @property
    def laterals(self) -> list[Lateral]:
        """The lateral connections in front of the stages; empty in a fast pathway."""
        return [getattr(self, name) for name in self.LATERAL_NAMES if hasattr(self, name)]

    def init_weights(self, zero_init_residual: bool = True):
        """Kaiming-normal convolutions (fan out, ReLU gain), unit batch norm, optionally zero at the residuals' end."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                module.reset_parameters()
        if zero_init_residual:
            for stage in self.stages:
                for block in stage:
                    nn.init.zeros_(block.last_norm.weight)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> ConvBNReLU3d | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return ConvBNReLU3d(in_channels, out_channels, (1, 1, 1), (1, stride, stride), relu=False)
