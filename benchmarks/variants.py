"""The ways to run one network that are compared, and how each is prepared and checked."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
from isolated import Isolated
from runtimes import RUNTIMES
from torch import Tensor, nn

import slowfast_ext
from slowfast_ext.evaluation.measuring import peak_memory, relative_error, tolerance
from slowfast_ext.models import BasicBlock3d, Bottleneck3d

WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Variant:
    """One way to run the network.

    Args:
        description: for the report.
        memory_format: of the weights and of the clip.
        autocast: float32 weights under autocast, in place of weights in the asked-for type.
        compile: ``options`` of ``torch.compile``, None for eager. No two variants may have the same: dynamo takes
            networks of one structure and equal options for the same, and would run the first one's code for both.
            ``"freezing"`` folds batch norm into the convolutions.
        ours: "accelerate" or "engine", through which of the two it runs; "" for neither.
        runtime: a name in `runtimes.RUNTIMES`, which it is converted for; "" for none.
        without: packages that it runs without, in a process of its own. On a CPU an engine always has one: it
            changes how its process keeps freed memory, which would help the others too. So has a runtime that is not
            torch's, for its threads are not torch's either.
        dtypes: in which it can compute.
        default_on: types of devices on which it runs unless ``--variants`` says otherwise.
    """

    description: str
    memory_format: torch.memory_format = torch.channels_last_3d
    autocast: bool = False
    compile: dict | None = None
    ours: str = ""
    runtime: str = ""
    without: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    default_on: tuple[str, ...] = ("cpu", "cuda")

    @property
    def is_plain(self) -> bool:
        """Whether it is what torch alone offers."""
        return not self.ours and not self.is_foreign

    @property
    def is_foreign(self) -> bool:
        """Whether something else than torch runs it."""
        return self.runtime not in ("", "torchscript")


VARIANTS = {
    "eager": Variant("plain modules, contiguous", torch.contiguous_format),
    "eager_channels_last": Variant("plain modules, channels_last_3d"),
    "autocast_channels_last": Variant(
        "plain modules, float32 weights, autocast, channels_last_3d", autocast=True, dtypes=("bfloat16", "float16")
    ),
    # Without freezing, inductor was slower wherever it was tried; on a CPU it would double the time of the whole run.
    "compile": Variant("torch.compile, channels_last_3d", compile={}, default_on=("cuda",)),
    "compile_freezing": Variant("torch.compile, freezing, channels_last_3d", compile={"freezing": True}),
    "compile_cuda_graph": Variant(
        "torch.compile, freezing, CUDA graph, channels_last_3d",
        compile={"freezing": True, "triton.cudagraphs": True},
        default_on=("cuda",),
    ),
    "compile_max_autotune": Variant(
        "torch.compile, freezing, max-autotune, CUDA graph, channels_last_3d",
        compile={
            "freezing": True,
            "triton.cudagraphs": True,
            "max_autotune": True,
            "coordinate_descent_tuning": True,
        },
        default_on=(),
    ),
    "torchscript": Variant(
        "torch.jit.freeze, optimize_for_inference",
        torch.contiguous_format,
        runtime="torchscript",
        dtypes=("float32",),
        default_on=(),
    ),
    "onnxruntime": Variant(
        "ONNX Runtime", torch.contiguous_format, runtime="onnxruntime", dtypes=("float32",), default_on=()
    ),
    "openvino": Variant(
        "OpenVINO",
        torch.contiguous_format,
        runtime="openvino",
        dtypes=("float32", "bfloat16"),
        default_on=("cpu",),
    ),
    "accelerate": Variant("slowfast_ext.accelerate, channels_last_3d", ours="accelerate"),
    "engine_torch_alone": Variant(
        "slowfast_ext.InferenceEngine without OpenVINO",
        torch.contiguous_format,
        ours="engine",
        without=("openvino",),
        default_on=("cpu",),
    ),
    "engine": Variant("slowfast_ext.InferenceEngine", torch.contiguous_format, ours="engine"),
}


@dataclass
class Outcome:
    """What became of a variant.

    Attributes:
        status: "ready", then "timed"; "wrong" where the output is off by more than ``tolerance``; "failed" where it
            could not run.
        reason: why it is "wrong" or "failed".
        error: ``||output - reference|| / ||reference||``.
        prepare_seconds: from the plain network to the first output: conversion, compilation, folding.
        peak_memory: bytes, see :func:`prepare`.
        blocks: for ours, what ``explain`` or the plan says: the number of blocks or steps by how they ran.
        call: runs it once; None unless it is "ready" or "timed".
        samples: milliseconds of a call.
    """

    status: str = "failed"
    reason: str | None = None
    error: float | None = None
    prepare_seconds: float | None = None
    peak_memory: int | None = None
    blocks: dict[str, int] | None = None
    call: Callable[[], Tensor] | None = None
    samples: list[float] = field(default_factory=list)


def create_network(name: str, seed: int = 0) -> nn.Module:
    """A zoo network in evaluation mode whose every layer matters to the output.

    Freshly made networks end each residual branch with a zero, which would hide wrong branches. Here batch norms have
    random weights and biases, and the statistics of one batch of noise. The weights that end a branch are small, as
    in trained networks: with larger ones the network would amplify rounding by a factor of ten, with these by two.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = slowfast_ext.create_model(name)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm3d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 1.0)
            nn.init.normal_(norm.bias, std=0.1)
            norm.momentum = 1.0
        for block in model.modules():
            if isinstance(block, (BasicBlock3d, Bottleneck3d)):
                nn.init.uniform_(block.last_norm.weight, 0.1, 0.3)
        with torch.no_grad():
            model.train()(torch.randn(1, 3, model.config.clip_len, 64, 64))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval().requires_grad_(False)


def reference_output(model: nn.Module, clip: Tensor, device: torch.device) -> Tensor:
    """Logits of eager float32 without TF32, on ``device``, clip by clip to need little memory."""
    model = copy.deepcopy(model).to(device)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        return torch.cat([model(part.to(device)) for part in clip.split(1)])


def prepare(
    variant: Variant, model: nn.Module, clip: Tensor, reference: Tensor, dtype: torch.dtype, device: torch.device
) -> Outcome:
    """Build a variant, compare its output with the reference, warm it up and measure its memory.

    Peak memory on a CUDA device is all that the variant makes torch allocate: weights, clip, workspaces, activations.
    On a CPU it is the growth of the process's resident memory during one warm call, hence without weights.

    Args:
        model: plain, float32, on the CPU; not changed.
        clip (Tensor[N, 3, T, H, W]): float32, on the CPU.
        reference (Tensor[N, classes]): what it should give.
    """
    outcome = Outcome()
    on_cuda = device.type == "cuda"
    held = torch.cuda.memory_allocated(device) if on_cuda else 0
    start = time.perf_counter()
    try:
        if (variant.ours == "engine" and not on_cuda) or variant.is_foreign:
            call = Isolated(_build, (variant, model, clip, dtype, device), variant.without)
            blocks = call.known
        else:
            call, blocks = _build(variant, model, clip, dtype, device)
        with _inductor_freezing(bool(variant.compile and variant.compile.get("freezing"))):
            output = call().float()
        outcome.prepare_seconds = time.perf_counter() - start
        if not check_output(outcome, output, reference, tolerance(dtype, device)):
            return outcome
        for _ in range(WARM_UP_CALLS if on_cuda else 1):
            call()
        isolated = isinstance(call, Isolated)
        outcome.peak_memory = call.peak_growth() if isolated else peak_memory(call, device, held)
        outcome.blocks = blocks() if callable(blocks) else blocks
    except Exception as error:  # compilers and kernels fail in many ways; the other variants go on
        outcome.reason = first_lines(error)
        return outcome
    outcome.status, outcome.call = "ready", call
    return outcome


def check_output(outcome: Outcome, output: Tensor, reference: Tensor, limit: float) -> bool:
    """Note the error of a float32 output, and that it is wrong where it is off by more than ``limit``."""
    outcome.error = relative_error(output, reference)
    if outcome.error <= limit:  # NaN is wrong
        return True
    outcome.status = "wrong"
    outcome.reason = f"relative error {outcome.error:.1e} against eager float32, allowed {limit:.0e}"
    return False


def _build(
    variant: Variant, model: nn.Module, clip: Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], Tensor], Callable[[], dict] | dict | None]:
    """What runs the network once, and for ours how its parts run (of accelerate a function, to be called after it)."""
    weights = torch.float32 if variant.autocast or variant.runtime or variant.ours == "engine" else dtype
    twin = copy.deepcopy(model).to(device, weights, memory_format=variant.memory_format)
    # Inference tensors are refused by parts of torch.compile; the clip is made outside inference_mode.
    clip = clip.to(device, weights).contiguous(memory_format=variant.memory_format)
    if variant.runtime:
        return RUNTIMES[variant.runtime](twin, clip, dtype), None
    if variant.ours == "engine":
        with _without_former_choices():
            engine = slowfast_ext.InferenceEngine(twin, dtype=dtype)
            engine(clip)
        return lambda: engine(clip), dict(Counter(f"steps in {step.kernel}" for step in engine.plan.steps))
    forward = twin
    if variant.ours:
        forward = twin = slowfast_ext.accelerate(twin)
    if variant.compile is not None:
        forward = torch.compile(twin, dynamic=False, options=variant.compile)

    def call() -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=variant.autocast):
            return forward(clip)

    return call, partial(_blocks, twin) if variant.ours else None


@contextmanager
def _without_former_choices():
    """The engine tunes anew: what it chose another time it chose on a machine in another state."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, SLOWFAST_EXT_CACHE=folder):
        yield


@contextmanager
def _inductor_freezing(enabled: bool):
    """Freezing during the first call: without this global switch the option of ``torch.compile`` has no effect."""
    if not enabled:
        yield
        return
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True):
        yield


def _blocks(model: nn.Module) -> dict[str, int]:
    return dict(
        Counter(
            f"plain: {row.reason}" if row.reason else f"fused, run by {row.served_by}"
            for row in slowfast_ext.explain(model).rows
        )
    )


def first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    return f"{type(error).__name__}: {' '.join(lines)}"[:300]
