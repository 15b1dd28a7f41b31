"""What a forward pass keeps for the backward pass: measured, and by counting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from slowfast_ext.models import BasicBlock3d, Bottleneck3d, Lateral, Stem
from slowfast_ext.nn.training import RECOMPUTED_CHANNELS

INDEX_BYTES = 8  # of the place of a maximum


class KeptTensors:
    """While it is entered, notes the storages of all tensors that autograd keeps.

    Args:
        owners: modules and tensors whose storages do not count.

    Attributes:
        bytes: of all storages, each once.
    """

    def __init__(self, owners: Iterable[nn.Module | Tensor]):
        own = []
        for owner in owners:
            own += [owner] if isinstance(owner, Tensor) else [*owner.parameters(), *owner.buffers()]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def __enter__(self) -> KeptTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def count_kept(model: nn.Module, clip: Sequence[int], dtype: torch.dtype, fused: bool, device_type: str) -> int:
    """Bytes kept for a backward pass of a training step, by counting activations.

    Plain blocks keep what goes into each convolution and what comes out of it, and the result of each ReLU; their
    stems also the places of the maxima. Fused blocks keep what goes into them, and what comes out of each of their
    convolutions but those that they compute again. Under autocast both keep the weights in 16 bits.

    Args:
        model: a plain SlowFast in training mode, on the device "meta".
        clip: shape (N, 3, T, H, W).
        dtype: of the arithmetic, under autocast if it is one of 16 bits.
        fused: of fused blocks.
        device_type: on which they run.
    """
    maps: dict[int, Tensor] = {}  # by storage; alive, so that no other gets its place
    elements = indices = 0

    def keep(tensor: Tensor) -> None:
        maps[tensor.untyped_storage()._cdata] = tensor

    def of_convolution(conv, inputs, output):
        nonlocal elements
        block, ends_block = owners[conv]
        if not fused and not isinstance(block, Stem):
            keep(inputs[0])
        bare = isinstance(block, Lateral) and block.bn is None
        if not bare and not (fused and ends_block and _is_computed_again(conv, device_type)):
            elements += output.numel()

    def of_relu(block, inputs, output):
        nonlocal elements
        if fused:
            keep(inputs[-1])
        elif not isinstance(block, Lateral):
            keep(output)
        elif block.bn is not None:
            elements += inputs[0].shape[0] * block.conv.out_channels * output[:, 0].numel() // output.shape[0]

    def of_stem(stem, inputs, output):
        nonlocal elements, indices
        fast = stem is model.backbone.fast_path.conv1
        a_view = inputs[0].shape[2] == clip[2] or (not fused and (fast or model.config.frame_sampling == "strided"))
        if dtype.itemsize < 4 or not a_view:
            elements += inputs[0].numel()
        if not fused:
            height, width = ((size - 1) // 2 + 1 for size in inputs[0].shape[3:])
            elements += output.numel() // output[0, 0, 0].numel() * height * width
            indices += output.numel()

    owners, handles = {}, []
    for block in model.modules():
        if isinstance(block, Stem):
            handles.append(block.register_forward_hook(of_stem))
        elif isinstance(block, (BasicBlock3d, Bottleneck3d, Lateral)):
            handles.append(block.register_forward_hook(of_relu))
        else:
            continue
        last = "conv3" if isinstance(block, Bottleneck3d) else "conv2"
        for name, conv in block.named_modules():
            if isinstance(conv, nn.Conv3d):
                owners[conv] = (block, name.split(".")[0] in (last, "downsample"))
                handles.append(conv.register_forward_hook(of_convolution))
    slow, fast = model.backbone(torch.empty(tuple(clip), device="meta"))
    for handle in handles:
        handle.remove()
    if fused:
        keep(slow)
        keep(fast)
    elements += sum(tensor.numel() for tensor in maps.values())
    if dtype.itemsize < 4:
        elements += sum(conv.weight.numel() for conv in owners)
    return elements * dtype.itemsize + indices * INDEX_BYTES


def _is_computed_again(conv: nn.Conv3d, device_type: str) -> bool:
    narrow = conv.in_channels <= min(conv.out_channels, RECOMPUTED_CHANNELS[device_type])
    return conv.kernel_size == (1, 1, 1) and narrow
