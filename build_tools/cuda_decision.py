"""Whether the CUDA kernels are built, and for which GPUs; read by setup.py."""

import os
import re
import shutil
import subprocess
from pathlib import Path

OLDEST_CAPABILITY = (8, 0)  # cp.async and bfloat16 tensor cores


def find_cuda_home():
    """First candidate that holds both nvcc and the headers (an nvcc wrapper on PATH holds neither)."""
    nvcc = shutil.which("nvcc")
    on_path = nvcc and str(Path(nvcc).resolve().parents[1])
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), on_path, "/usr/local/cuda"):
        if home and (Path(home) / "bin/nvcc").is_file() and (Path(home) / "include/cuda_runtime.h").is_file():
            return home
    return None


def capability(name):
    """(major, minor) of an entry of TORCH_CUDA_ARCH_LIST such as 8.0, 9.0a or 12.0+PTX; None for a code name."""
    match = re.match(r"(\d+)\.(\d)", name)
    return (int(match[1]), int(match[2])) if match else None


def known_capabilities(cuda_home):
    """What this nvcc can compile for, oldest first."""
    listing = subprocess.run([f"{cuda_home}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    codes = sorted({int(code) for code in re.findall(r"compute_(\d+)", listing.stdout)})
    return [divmod(code, 10) for code in codes]


def choose_architectures(torch, cuda_home):
    """The entries to build for, and a word on where they come from."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if requested:
        names = requested.replace(";", " ").split()
        kept = [name for name in names if (capability(name) or OLDEST_CAPABILITY) >= OLDEST_CAPABILITY]
        left_out = [name for name in names if name not in kept]
        note = f", left out {' '.join(left_out)}: the kernels need 8.0" if left_out else ""
        return kept, f"TORCH_CUDA_ARCH_LIST{note}"
    if torch.cuda.is_available():
        visible = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
        kept = [f"{major}.{minor}" for major, minor in visible if (major, minor) >= OLDEST_CAPABILITY]
        return kept, "the visible GPU" if kept else "the visible GPU is older than 8.0"
    # A binary runs on every later GPU of the same major version, so the oldest of each is enough; the PTX is for
    # GPUs that this nvcc does not know.
    oldest = {}
    for major, minor in known_capabilities(cuda_home):
        if (major, minor) >= OLDEST_CAPABILITY:
            oldest.setdefault(major, f"{major}.{minor}")
    names = list(oldest.values())
    return [*names[:-1], f"{names[-1]}+PTX"], "no GPU is visible: everything this nvcc knows"


def decide():
    """(architectures or None, what was decided and why)."""
    choice = os.environ.get("SLOWFAST_EXT_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"setup: SLOWFAST_EXT_CUDA must be auto, 0 or 1, got {choice}")
    if choice == "0":
        return None, "SLOWFAST_EXT_CUDA=0"
    cuda_home = find_cuda_home()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # read by torch.utils.cpp_extension when it is imported
    import torch

    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} has no CUDA"
    elif cuda_home is None:
        missing = "no CUDA toolkit (nvcc and headers) found in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    else:
        architectures, source = choose_architectures(torch, cuda_home)
        if architectures:
            return architectures, f"for {' '.join(architectures)} ({source}; torch {torch.__version__}, {cuda_home})"
        missing = f"no architecture is left to build for ({source})"
    if choice == "1":
        raise SystemExit(f"setup: SLOWFAST_EXT_CUDA=1, but {missing}")
    return None, missing
