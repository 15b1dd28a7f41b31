"""Write a checkpoint with mmaction2's names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch

from .load import LoadReport, load_checkpoint
from .settings import CONFIG_ENTRY


def convert(source: str | os.PathLike, destination: str | os.PathLike) -> LoadReport:
    """Rewrite a SlowFast checkpoint of any known kind with mmaction2's names.

    The network's configuration is stored beside the weights, so that :func:`load_checkpoint` of the result gives the
    same network: same scores from the same clips. mmaction2 itself reads the ``.pth`` form, but has no counterpart of
    ``linspace`` frame sampling and sliding head pooling.

    Args:
        source: a file for :func:`load_checkpoint`.
        destination: ``.pth`` (a dictionary with ``meta`` and ``state_dict``) or ``.safetensors`` (configuration in the
            header's metadata). Written beside itself first, then renamed; an existing file is replaced.

    Raises:
        ValueError: another suffix, or ``source`` is no SlowFast checkpoint.
        FileNotFoundError: no ``source``, or no folder for ``destination``.
    """
    destination = Path(destination)
    if destination.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"convert: destination must end in .pth or .safetensors, got {str(destination)!r}")
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"convert: the folder of destination must exist, got {str(destination.parent)!r}")
    model = load_checkpoint(source)
    config = json.dumps(model.config.to_dict())
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}")
    try:
        if destination.suffix == ".pth":
            torch.save({"meta": {CONFIG_ENTRY: config}, "state_dict": model.state_dict()}, temporary)
        else:
            weights = {name: value.contiguous() for name, value in model.state_dict().items()}
            safetensors.torch.save_file(weights, temporary, metadata={CONFIG_ENTRY: config})
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)
    return model.load_report
