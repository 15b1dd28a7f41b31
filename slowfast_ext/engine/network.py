"""A recogniser as data: its convolutions with their batch norms folded, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models import SlowFastConfig, SlowFastRecognizer
from ..models.head import SlowFastHead
from ..models.resnet3d import BasicBlock3d, Bottleneck3d, ConvBNReLU3d, Lateral, ResNet3dPathway, Stem
from ..models.slowfast import SlowFastBackbone
from ..ops import fold_batch_norm, stem_reason_against

Triple = tuple[int, int, int]

# What the engine replaces by its own steps; a subclass may compute something else.
_KNOWN = (
    SlowFastRecognizer,
    SlowFastBackbone,
    SlowFastHead,
    ResNet3dPathway,
    BasicBlock3d,
    Bottleneck3d,
    ConvBNReLU3d,
    Stem,
    Lateral,
    nn.Sequential,
    nn.Conv3d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.MaxPool3d,
    nn.Dropout,
    nn.Linear,
)


@dataclass(eq=False)
class Convolution:
    """``relu(conv3d(x) + bias)``.

    Attributes:
        name: of the block in the network, "slow_path.layer1.0.conv1".
        weight (Tensor[K, C, kernel_t, kernel_h, kernel_w]): rounded once, channels_last_3d.
        bias (Tensor[K]): float32, or None.
        relu: whether the ReLU follows; in a residual block's last convolution, after the addition.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    stride: Triple
    padding: Triple
    relu: bool

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes (N, C, T, H, W) of the input -> of the output."""
        sizes = (
            (size + 2 * pad - kernel) // step + 1
            for size, pad, kernel, step in zip(shape[2:], self.padding, self.weight.shape[2:], self.stride, strict=True)
        )
        return shape[0], self.weight.shape[0], *sizes


@dataclass(eq=False)
class Block:
    """``relu(branch(x) + shortcut(x))``; without a shortcut convolution the identity."""

    name: str
    branch: tuple[Convolution, ...]
    shortcut: Convolution | None


@dataclass(eq=False)
class Pathway:
    """A stem, whose convolution is followed by a 1x3x3 maximum of stride (1, 2, 2), and stages of blocks.

    Attributes:
        stem_reason: why :func:`~slowfast_ext.ops.stem` has no kernel for the stem, or None.
    """

    stem: Convolution
    stem_reason: str | None
    stages: tuple[tuple[Block, ...], ...]


@dataclass(eq=False)
class Network:
    """Everything of a recogniser that a forward pass needs; no part of the model itself.

    Attributes:
        laterals: in front of the four stages.
        head_weight (Tensor[num_classes, C]), head_bias (Tensor[num_classes]): of the classifier, float32.
    """

    config: SlowFastConfig
    slow: Pathway
    fast: Pathway
    laterals: tuple[Convolution, ...]
    head_weight: Tensor
    head_bias: Tensor | None
    dtype: torch.dtype
    device: torch.device


def read_network(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Network:
    """Fold ``model`` into data of ``dtype``.

    Raises:
        TypeError: the model, or a module in it, is of a class that the engine does not know.
        ValueError: the model is in training mode or elsewhere, or a module in it has hooks or a changed geometry.
    """
    if not isinstance(model, SlowFastRecognizer):
        raise TypeError(
            f"InferenceEngine: model must be a SlowFastRecognizer, got {type(model).__name__}; "
            "for other networks slowfast_ext.accelerate(model) replaces the blocks that can be fused"
        )
    for name, module in model.named_modules():
        _check_module(name or "model", module)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.device != device:
            raise ValueError(f"InferenceEngine: {name} must be on {device}, got {tensor.device}")

    def convolution(name: str, block: nn.Module) -> Convolution:
        weight, bias = fold_batch_norm(block.conv.weight, block.conv.bias, block.bn)
        weight = weight.to(dtype=dtype, memory_format=torch.channels_last_3d, copy=True)
        return Convolution(
            name, weight, None if bias is None else bias.float(), block.conv.stride, block.conv.padding, block.relu
        )

    def residual_block(name: str, block: BasicBlock3d | Bottleneck3d) -> Block:
        names = ("conv1", "conv2", "conv3") if isinstance(block, Bottleneck3d) else ("conv1", "conv2")
        branch = [convolution(f"{name}.{part}", getattr(block, part)) for part in names]
        if branch[-1].relu:
            raise ValueError(
                f"InferenceEngine: {branch[-1].name} must have its ReLU after the addition, got one before"
            )
        branch[-1].relu = True
        shortcut = None if block.downsample is None else convolution(f"{name}.downsample", block.downsample)
        return Block(name, tuple(branch), shortcut)

    def pathway(name: str, module: ResNet3dPathway) -> Pathway:
        stages = [
            tuple(residual_block(f"{name}.layer{number}.{index}", block) for index, block in enumerate(stage))
            for number, stage in enumerate(module.stages, start=1)
        ]
        reason = stem_reason_against(module.conv1.conv, module.conv1.maxpool)
        return Pathway(convolution(f"{name}.conv1", module.conv1), reason, tuple(stages))

    backbone, head = model.backbone, model.head
    laterals = zip(ResNet3dPathway.LATERAL_NAMES, backbone.slow_path.laterals, strict=True)
    with torch.no_grad():
        return Network(
            model.config,
            pathway("slow_path", backbone.slow_path),
            pathway("fast_path", backbone.fast_path),
            tuple(convolution(f"slow_path.{name}", lateral) for name, lateral in laterals),
            head.fc_cls.weight.to(torch.float32, copy=True),
            None if head.fc_cls.bias is None else head.fc_cls.bias.to(torch.float32, copy=True),
            dtype,
            device,
        )


def _check_module(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if type(module) not in _KNOWN:
        hint = "restore(model) first" if hasattr(module, "plain") else "slowfast_ext.accelerate(model) keeps such parts"
        raise TypeError(f"InferenceEngine: {name} must be of a class that the engine knows, got {kind}; {hint}")
    if module.training:
        raise ValueError(f"InferenceEngine: {name} must be in evaluation mode, call model.eval(), got training mode")
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or "forward" in module.__dict__ or module._compiled_call_impl is not None:
        raise ValueError(
            f"InferenceEngine: {name} ({kind}) must be called as it is, got hooks or a replaced forward; "
            "slowfast_ext.accelerate(model) keeps them"
        )
    if isinstance(module, nn.Conv3d) and (module.groups, module.dilation, module.padding_mode) != (
        1,
        (1, 1, 1),
        "zeros",
    ):
        raise ValueError(
            f"InferenceEngine: {name} must have one group, no dilation and zero padding, got {module}; "
            "slowfast_ext.accelerate(model) keeps it"
        )
    if isinstance(module, nn.MaxPool3d):
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
        if geometry != ((1, 3, 3), (1, 2, 2), (0, 1, 1), 1, False):
            raise ValueError(f"InferenceEngine: {name} must be a 1x3x3 maximum of stride (1, 2, 2), got {module}")
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        raise ValueError(f"InferenceEngine: {name} must have running statistics, got none")
