"""Training passes through :func:`torch.compile`."""

from __future__ import annotations

import torch
from torch import nn

COMPILE_MODES = ("default", "reduce-overhead")

_SHAPES = 64  # of clips and batches that are compiled before torch gives up: multigrid has some dozen


def require_compiler(device: torch.device) -> None:
    """See that :func:`torch.compile` works here: it needs a C++ compiler on a CPU and Triton on a GPU.

    Raises:
        ValueError: it does not.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compilers behind it raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"--compile must have a compiler that works on {device.type}, got {type(error).__name__}: {reason}"
        ) from error


def compile_network(model: nn.Module, mode: str) -> nn.Module:
    """The network as its training passes call it, compiled anew for each shape; ``model`` itself stays as it is."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    return torch.compile(model, mode=mode, dynamic=False)
