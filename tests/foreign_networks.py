"""Networks with the structures of other code bases, which know nothing of this one; small, and written by hand."""

import torch
import torch.nn.functional as F
from torch import nn

# --- as in torchvision's video ResNets: Sequentials, convolutions of derived classes, += and in-place ReLU


class TemporalConv(nn.Conv3d):
    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__(in_channels, out_channels, 3, stride, 1, bias=False)

    @staticmethod
    def downsample_stride(stride):
        return (stride,) * 3


class FactorisedConv(nn.Sequential):
    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__(
            nn.Conv3d(in_channels, 6, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            nn.BatchNorm3d(6),
            nn.ReLU(inplace=True),
            nn.Conv3d(6, out_channels, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
        )


class SequentialBlock(nn.Module):
    def __init__(self, conv, in_channels, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Sequential(conv(in_channels, channels, stride), nn.BatchNorm3d(channels), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(conv(channels, channels), nn.BatchNorm3d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv3d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm3d(channels)
            )

    def forward(self, x):
        residual = x
        out = self.conv1(x)
        out = self.conv2(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class SequentialNetwork(nn.Module):
    def __init__(self, conv=TemporalConv):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(8), nn.ReLU(inplace=True)
        )
        self.layer1 = nn.Sequential(SequentialBlock(conv, 8, 8), SequentialBlock(conv, 8, 8))
        self.layer2 = nn.Sequential(SequentialBlock(conv, 8, 12, 2))
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(self.avgpool(x).flatten(1))


# --- as in pytorchvideo: branches and norms as separate children, a lambda that adds, lists that are changed in place


class Branch(nn.Module):
    def __init__(self, in_channels, channels, out_channels, stride):
        super().__init__()
        self.conv_a = nn.Conv3d(in_channels, channels, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.norm_a, self.act_a = nn.BatchNorm3d(channels), nn.ReLU()
        self.conv_b = nn.Conv3d(channels, channels, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.norm_b, self.act_b = nn.BatchNorm3d(channels), nn.ReLU()
        self.conv_c = nn.Conv3d(channels, out_channels, 1, bias=False)
        self.norm_c = nn.BatchNorm3d(out_channels)

    def forward(self, x):
        for name in "ab":
            x = getattr(self, f"act_{name}")(getattr(self, f"norm_{name}")(getattr(self, f"conv_{name}")(x)))
        return self.norm_c(self.conv_c(x))


class BranchedBlock(nn.Module):
    def __init__(self, in_channels, channels, out_channels, stride=1):
        super().__init__()
        shortcut = stride > 1 or in_channels != out_channels
        self.branch1_conv = (
            nn.Conv3d(in_channels, out_channels, 1, (1, stride, stride), bias=False) if shortcut else None
        )
        self.branch1_norm = nn.BatchNorm3d(out_channels) if shortcut else None
        self.branch2 = Branch(in_channels, channels, out_channels, stride)
        self.activation = nn.ReLU()
        self.branch_fusion = lambda x, y: x + y

    def forward(self, x):
        if self.branch1_conv is None:
            x = self.branch_fusion(x, self.branch2(x))
        else:
            shortcut = self.branch1_conv(x)
            if self.branch1_norm is not None:
                shortcut = self.branch1_norm(shortcut)
            x = self.branch_fusion(shortcut, self.branch2(x))
        return self.activation(x)


class PoolingStem(nn.Module):
    def __init__(self, out_channels, kernel_t):
        super().__init__()
        self.conv = nn.Conv3d(3, out_channels, (kernel_t, 7, 7), (1, 2, 2), (kernel_t // 2, 3, 3), bias=False)
        self.norm, self.activation = nn.BatchNorm3d(out_channels), nn.ReLU()
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))

    def forward(self, x):
        return self.pool(self.activation(self.norm(self.conv(x))))


class FastToSlow(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv_fast_to_slow = nn.Conv3d(channels, 2 * channels, (7, 1, 1), (4, 1, 1), (3, 0, 0), bias=False)
        self.norm, self.activation = nn.BatchNorm3d(2 * channels), nn.ReLU()

    def forward(self, x):
        slow, fast = x[0], x[1]
        fused = self.activation(self.norm(self.conv_fast_to_slow(fast)))
        return [torch.cat([slow, fused], 1), fast]


class Pathways(nn.Module):
    def __init__(self, blocks, fusion):
        super().__init__()
        self.multipathway_blocks, self.multipathway_fusion = nn.ModuleList(blocks), fusion

    def forward(self, x):
        for index, block in enumerate(self.multipathway_blocks):
            x[index] = block(x[index])
        return x if self.multipathway_fusion is None else self.multipathway_fusion(x)


class TwoPathwayNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                Pathways([PoolingStem(16, 1), PoolingStem(4, 5)], FastToSlow(4)),
                Pathways(
                    [
                        nn.Sequential(BranchedBlock(24, 8, 16, 2), BranchedBlock(16, 8, 16)),
                        nn.Sequential(BranchedBlock(4, 4, 8, 2), BranchedBlock(8, 4, 8)),
                    ],
                    None,
                ),
            ]
        )
        self.proj = nn.Linear(24, 5)

    def forward(self, x):
        x = [x[:, :, ::4], x]
        assert len(x) == 2
        for block in self.blocks:
            x = block(x)
        return self.proj(torch.cat([pathway.mean((2, 3, 4)) for pathway in x], 1))


# --- as in mmcv: a convolution with a forward of its own, a module whose order of layers is data, flags as arguments


class WrappedConv(nn.Conv3d):
    def forward(self, x):
        if x.numel() == 0:
            raise NotImplementedError("an empty batch")
        return super().forward(x)


class ConvModule(nn.Module):
    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, activation=True, order=("conv", "norm", "act")
    ):
        super().__init__()
        self.order, self.with_activation = order, activation
        self.conv = WrappedConv(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm3d(out_channels if order[0] == "conv" else in_channels)
        self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self):
        return self.bn

    def forward(self, x, activate=True, norm=True):
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class ConvModuleBlock(nn.Module):
    def __init__(self, in_channels, channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = ConvModule(in_channels, channels, 1)
        self.conv2 = ConvModule(channels, channels, 3, stride)
        self.conv3 = ConvModule(channels, out_channels, 1, activation=False)
        self.downsample = ConvModule(in_channels, out_channels, 1, stride, activation=False)
        self.relu = nn.ReLU(inplace=True)
        self.with_checkpoint = False

    def forward(self, x):
        def inner(x):
            out = self.conv3(self.conv2(self.conv1(x)))
            return out + (x if self.downsample is None else self.downsample(x))

        if self.with_checkpoint and x.requires_grad:
            out = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
        else:
            out = inner(x)
        return self.relu(out)


class ConvModuleNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = ConvModule(3, 8, 3, 2)
        self.layer1 = nn.Sequential(ConvModuleBlock(8, 4, 16, 2), ConvModuleBlock(16, 4, 16))
        self.preactivation = ConvModule(16, 8, 3, order=("norm", "act", "conv"))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        if x.shape[2] % 2:  # which nothing can record
            raise ValueError("an even number of frames is needed")
        return self.fc(self.preactivation(self.layer1(self.conv1(x))).mean((2, 3, 4)))


# --- as in many papers' code: layers beside blocks in one forward, functions for ReLU, layers that cannot be fused


class FlatNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(3, 8, 3, (1, 2, 2), 1), nn.BatchNorm3d(8)
        self.layer1 = nn.Sequential(SequentialBlock(TemporalConv, 8, 8), SequentialBlock(FactorisedConv, 8, 8))
        self.grouped, self.bn2 = nn.Conv3d(8, 8, 3, padding=1, groups=4), nn.BatchNorm3d(8)
        self.dilated, self.bn3 = nn.Conv3d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm3d(8)
        self.bare = nn.Conv3d(8, 8, 1)
        self.scale = nn.Parameter(torch.full((8, 1, 1, 1), 0.7))
        self.conv4, self.conv5 = nn.Conv3d(8, 8, 1), nn.Conv3d(8, 8, 1)
        self.unused = nn.Conv3d(8, 8, 1)
        self.classifier = nn.Conv3d(8, 5, 1)

    def forward(self, x):
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        x = torch.relu_(self.bn2(self.grouped(x)))
        x = self.bn3(self.dilated(x)).relu()
        y = self.bare(x)
        x = (y * self.scale + y).relu()
        x = (x + self.conv4(x)).relu() + F.relu(self.conv5(x), inplace=True)
        return self.classifier(x).mean((2, 3, 4))


NETWORKS = {
    "sequential": SequentialNetwork,
    "factorised": lambda: SequentialNetwork(FactorisedConv),
    "two_pathways": TwoPathwayNetwork,
    "conv_modules": ConvModuleNetwork,
    "flat": FlatNetwork,
}
