"""The operator namespace, and the compiled kernels behind it where there are any."""

import functools
import importlib

import torch

lib = torch.library.Library("slowfast_ext", "DEF")
lib.define("build_info() -> str", tags=(torch.Tag.pt2_compliant_tag,))

OLDEST_CAPABILITY = (8, 0)  # cp.async and bfloat16 tensor cores

_load_error: str | None = "the operators are not registered yet"


def load_kernels() -> None:
    """Load the compiled kernels; to be called once, when every schema they implement is defined."""
    global _load_error
    if torch.version.cuda is None:
        _load_error = f"this torch build ({torch.__version__}) has no CUDA"
        return
    try:
        importlib.import_module("slowfast_ext._C")
        _load_error = None
    except ModuleNotFoundError:
        _load_error = (
            "slowfast_ext was installed without CUDA kernels "
            "(reinstall where nvcc is found; with SLOWFAST_EXT_CUDA=1 the build says what is missing)"
        )
    except (ImportError, OSError) as error:
        _load_error = f"the compiled kernels do not load: {error}"


@functools.cache
def _capability_reason(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    name = f"{torch.cuda.get_device_name(index)} (compute capability {capability[0]}.{capability[1]})"
    if capability < OLDEST_CAPABILITY:
        return f"{name} is older than 8.0, which the kernels need; the plain modules run there"
    built = torch.ops.slowfast_ext.build_info().split()
    for entry in built:
        version, _, ptx = entry.partition("+")
        major, minor = (int(part.rstrip("af")) for part in version.split("."))
        if (major, minor) <= capability and (ptx or major == capability[0]):
            return None
    return f"the kernels were built for {' '.join(built)}, which does not cover {name}"


def unavailable_reason(device: torch.device | str | None = None) -> str | None:
    """Why the CUDA kernels cannot run, or None if they can.

    Args:
        device: where the tensors are; the current CUDA device if None.
    """
    device = torch.device("cuda" if device is None else device)
    if device.type != "cuda":
        return f"the kernels are CUDA-only, the tensors are on {device}"
    if _load_error:
        return _load_error
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return _capability_reason(torch.cuda.current_device() if device.index is None else device.index)
