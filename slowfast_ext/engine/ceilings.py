"""What a device can do at most, measured."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch

_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}  # large enough that launch and tail are below 1 %
_COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}  # larger than any cache
_RUNS = 5


@dataclass(frozen=True)
class Ceilings:
    """Limits of a device: operations (2 a multiply-accumulate) and bytes moved, a second."""

    operations: float
    bandwidth: float


@functools.cache
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A square matrix product through torch, and a copy within device memory (read plus written bytes); best of 5."""
    size, copied = _GEMM_SIZE[device.type], _COPIED_BYTES[device.type]
    with torch.inference_mode():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        source = torch.zeros(copied, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)

        def seconds(run) -> float:
            times = []
            for _ in range(_RUNS):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - start)
            return min(times[1:])

        tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # the rate of float32 convolutions
        try:
            operations = 2 * size**3 / seconds(lambda: torch.mm(a, b))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32
        return Ceilings(operations, 2 * copied / seconds(lambda: target.copy_(source)))
