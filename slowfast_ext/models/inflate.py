"""Start a pathway from an image classification network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .resnet3d import ResNet3dPathway


@dataclass(frozen=True)
class InflationReport:
    """What :func:`inflate_from_2d` did: entries of the pathway set and left as they were, 2-D entries not used."""

    loaded: list[str]
    kept: list[str]
    unused: list[str]


@torch.no_grad()
def inflate_from_2d(pathway: ResNet3dPathway, state_dict: dict[str, Tensor]) -> InflationReport:
    """Initialise ``pathway`` from a torchvision-style 2-D ResNet of the same depth and width.

    A 2-D filter is repeated over the temporal kernel and divided by its size, so that a still video gives the features
    of the image (Carreira and Zisserman, "Quo Vadis", arXiv 1705.07750). Inputs that come from lateral connections
    are zero-filled; the lateral connections themselves are left alone.

    Args:
        pathway: usually ``model.backbone.slow_path``.
        state_dict: names such as ``conv1.weight``, ``bn1.running_mean``, ``layer1.0.downsample.0.weight``.

    Raises:
        ValueError: an entry has a shape that does not fit, or none of the names is known; nothing is changed then.
    """
    own = pathway.state_dict()
    prepared, used = {}, set()
    for name, target in own.items():
        source_name = _name_in_2d(name)
        if source_name not in state_dict:
            continue
        value = state_dict[source_name]
        if name.endswith(".conv.weight"):
            value = _inflate(value, target)
        if value.shape != target.shape:
            raise ValueError(
                f"inflate_from_2d: {source_name} must fit {name} of shape {tuple(target.shape)}, "
                f"got {tuple(state_dict[source_name].shape)}"
            )
        prepared[name] = value
        used.add(source_name)
    if not prepared:
        raise ValueError(
            "inflate_from_2d: state_dict must be of a 2-D ResNet (conv1.weight, layer1.0.conv1.weight, ...)"
        )
    for name, value in prepared.items():
        own[name].copy_(value)
    kept = [name for name in own if name not in prepared]
    return InflationReport(list(prepared), kept, [name for name in state_dict if name not in used])


def _name_in_2d(name: str) -> str:
    if "_lateral." in name:
        return ""
    module, kind, entry = name.rsplit(".", 2)  # "layer1.0.conv1", "conv" or "bn", "weight"
    if module.endswith("downsample"):
        return f"{module}.{0 if kind == 'conv' else 1}.{entry}"
    return f"{module if kind == 'conv' else module.replace('conv', 'bn')}.{entry}"


def _inflate(weight: Tensor, target: Tensor) -> Tensor:
    """Tensor[K, C, S, U] -> Tensor[K, C + laterals, R, S, U]; unchanged if it cannot be done."""
    if weight.dim() != 4 or weight.shape[1] > target.shape[1]:
        return weight
    kernel = target.shape[2]
    weight = weight.unsqueeze(2).expand(-1, -1, kernel, -1, -1) / kernel
    zeros = weight.new_zeros(weight.shape[0], target.shape[1] - weight.shape[1], *weight.shape[2:])
    return torch.cat([weight, zeros], 1)
