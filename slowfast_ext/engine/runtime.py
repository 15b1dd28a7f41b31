"""A recogniser as one prepared program for each shape of clip."""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from .._library import unavailable_reason
from .autotune import Tuner
from .cpu import CpuBackend
from .cpu import unavailable_reason as cpu_unavailable_reason
from .fused import FusedBackend
from .network import read_network
from .openvino import FasterCpuBackend
from .plan import Plan, Signature
from .program import Program

logger = logging.getLogger(__name__)

_PROGRAMS = 8  # shapes that are kept prepared; each has an arena and a graph on a GPU
_FREE_SHARE = 0.8  # of a GPU's free memory that the views of a video may take


class InferenceEngine:
    """A SlowFast recogniser, prepared for inference: one plan for each shape of clip, nothing between its kernels.

    Weights are folded with their batch norms in float64, rounded once to ``dtype`` and laid out for the kernels; the
    engine is a snapshot, and neither keeps the model nor follows its changes. The first clip of a shape is planned
    (seconds), the plans of the last 8 shapes are kept. On a GPU all tensors of a plan lie in one arena, the pathways
    run on two streams and the whole is a CUDA graph. On a CPU the layers run in oneDNN, or the network in OpenVINO if
    that is installed (``pip install 'slowfast-ext[openvino]'``) and was measured to be faster.

    ``print(engine.plan)`` shows what runs where and why, with bytes, operations and the least time for each step.

    Threads may share an engine; their calls run one after the other. A process that forks must make its engine in the
    child. Engines cannot be pickled or copied.

    Args:
        model: a :class:`~slowfast_ext.models.SlowFastRecognizer` in evaluation mode, without hooks. For other networks
            there is :func:`~slowfast_ext.accelerate`.
        dtype: of weights and features: float32, bfloat16, or float16 on a GPU. That of the model's weights by default.
        device: where the model is; given, it is checked. Several GPUs have one engine each.
        max_views: clips of a video that run at once in :meth:`video`; None or "auto": what fits the GPU's free memory,
            one on a CPU.
        cuda_graph: "auto" (on a GPU), True or False.
        autotune: "auto" or True: each layer runs in what is fastest on this device, of the kernels whose result was
            checked; kept in ``~/.cache/slowfast_ext/autotune.json`` (or under ``SLOWFAST_EXT_CACHE``). False: the
            choices that a cost model makes.

    Raises:
        TypeError, ValueError: the model is not what the engine knows, in training mode, has hooks, or is elsewhere; an
            option has another value.
        RuntimeError: the kernels cannot run on this device, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_views: int | str | None = None,
        cuda_graph: bool | str = "auto",
        autotune: bool | str = "auto",
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"InferenceEngine: model must be a torch.nn.Module, got {type(model).__name__}")
        weight = next(model.parameters(), None)
        if weight is None:
            raise TypeError(f"InferenceEngine: model must have parameters, got a {type(model).__name__} without")
        self.device = _device(device, weight.device)
        self.dtype = weight.dtype if dtype is None else dtype
        _check_dtype(self.dtype, self.device)
        self.max_views = _max_views(max_views)
        for name, value in (("cuda_graph", cuda_graph), ("autotune", autotune)):
            if value not in (True, False, "auto"):
                raise ValueError(f"InferenceEngine: {name} must be True, False or 'auto', got {value!r}")
        if cuda_graph is True and self.device.type != "cuda":
            raise ValueError(f"InferenceEngine: cuda_graph must be False or 'auto' on {self.device}, got True")
        network = read_network(model, self.dtype, self.device)
        self.config = network.config
        tuner = Tuner(self.device, _versions(self.device), enabled=bool(autotune))
        if self.device.type == "cuda":
            self._backend = FusedBackend(network, tuner, cuda_graph=bool(cuda_graph))
        else:
            self._backend = FasterCpuBackend(CpuBackend(network, tuner), tuner, model)
        self._tuner = tuner
        self._programs: OrderedDict[Signature, Program] = OrderedDict()
        self._lock = threading.Lock()
        self._last: torch.cuda.Event | None = None

    @torch.inference_mode()
    def __call__(self, clip: Tensor) -> Tensor:
        """Class scores.

        Args:
            clip (Tensor[N, 3, T, H, W] or Tensor[N, T, H, W, 3]): normalised and floating point in the first form, raw
                RGB frames in uint8 in the second, which are normalised as the network was trained; any strides, on the
                engine's device or the CPU. T must be divisible by the slow pathway's stride.

        Returns:
            Tensor[N, num_classes]: logits, float32.
        """
        return self._run(clip, "logits")

    @torch.inference_mode()
    def features(self, clip: Tensor) -> Tensor:
        """The averages over the last feature maps, slow channels then fast ones: float32 Tensor[N, C].

        The classifier has its weights the other way round, fast first.

        Args:
            clip: as for a call.
        """
        return self._run(clip, "features")

    @torch.inference_mode()
    def video(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """Class probabilities of one video: the mean over its views of ``softmax(logits)``, float32.

        Args:
            views: the clips of the video, as for a call: a tensor, or anything with a length whose slices are tensors,
                such as :class:`~slowfast_ext.data.VideoViews`. At most ``max_views`` of them run at once; if memory
                runs out with "auto", half as many from there on.

        Returns:
            Tensor[num_classes]
        """
        count = len(views)
        if count == 0:
            raise ValueError("InferenceEngine: views must be at least one clip, got none")
        at_once = self.max_views or self._fitting_views(views[:1], count)
        total, done = 0, 0
        while done < count:
            try:
                logits = self._run(views[done : done + at_once], "logits")
            except torch.OutOfMemoryError:
                if self.max_views is not None or at_once == 1:
                    raise
                self.clear()
                at_once = max(at_once // 2, 1)
                logger.warning("InferenceEngine: out of memory, going on with %d views at once", at_once)
                continue
            total = total + logits.softmax(1).sum(0)
            done += len(logits)
        return total / count

    @property
    def plan(self) -> Plan:
        """What ran last; before the first call, what a clip of the network's test views would run."""
        with self._lock:
            if not self._programs:
                config = self.config
                size = (1, 3, config.clip_len, config.test_crop_size, config.test_crop_size)
                self._prepared(Signature(size, False, "logits"))
            return next(reversed(self._programs.values())).plan()

    def clear(self) -> None:
        """Forget all plans and free their memory."""
        with self._lock:
            self._programs.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _run(self, clip: Tensor, output: str) -> Tensor:
        signature = self._signature(clip, output)
        if signature.shape[0] == 0:
            width = self._backend.network.head_weight.shape[0 if output == "logits" else 1]
            return torch.empty(0, width, device=self.device)
        with self._lock, _without_autocast(self.device):
            program = self._prepared(signature)
            if self.device.type == "cpu":
                return program(clip)
            with torch.cuda.device(self.device):
                stream = torch.cuda.current_stream()
                if self._last is not None:  # another thread's call may still run on another stream
                    stream.wait_event(self._last)
                result = program(clip)
                self._last = stream.record_event()
                return result

    def _prepared(self, signature: Signature) -> Program:
        program = self._programs.get(signature)
        if program is None:
            if self._programs:
                known = next(reversed(self._programs))
                logger.info("InferenceEngine: planned for %s, now also for %s", known.shape, signature.shape)
            with torch.inference_mode(), _without_autocast(self.device):
                program = self._backend.program(signature)
            self._tuner.save()
            self._programs[signature] = program
            while len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(signature)
        return program

    def _signature(self, clip: Tensor, output: str) -> Signature:
        """Check the clip before any work."""
        if not isinstance(clip, Tensor):
            raise TypeError(f"InferenceEngine: clip must be a tensor, got {type(clip).__name__}")
        raw = clip.dtype == torch.uint8
        form = "(N, T, H, W, 3) in uint8 or (N, 3, T, H, W) in floating point"
        if clip.dim() != 5 or clip.shape[4 if raw else 1] != 3 or not (raw or clip.is_floating_point()):
            hint = "; flatten the views into the batch: clip.flatten(0, 1)" if clip.dim() == 6 else ""
            raise ValueError(f"InferenceEngine: clip must be {form}, got {tuple(clip.shape)} in {clip.dtype}{hint}")
        if clip.device not in (self.device, torch.device("cpu")):
            raise ValueError(f"InferenceEngine: clip must be on {self.device} or the CPU, got {clip.device}")
        signature = Signature(tuple(clip.shape), raw, output)
        _, frames, height, width = signature.clip
        stride = self.config.resample_rate
        if frames == 0 or frames % stride:
            raise ValueError(
                f"InferenceEngine: frames of the clip must be a multiple of {stride} (slow stride), got {frames}"
            )
        if height == 0 or width == 0:
            raise ValueError(f"InferenceEngine: clip must have pixels, got {tuple(clip.shape)}")
        window = self.config.head_window
        if output == "logits" and self.config.head_pooling != "global":
            positions = (-(-height // 32), -(-width // 32))
            if positions[0] < window[0] or positions[1] < window[1]:
                raise ValueError(
                    f"InferenceEngine: the feature map must be at least as large as the sliding window {window}, got "
                    f"{positions} for a clip of {height} x {width} pixels"
                )
        return signature

    def _fitting_views(self, view: Tensor, count: int) -> int:
        """How many views of a video to run at once where the user leaves it open."""
        if self.device.type == "cpu":
            return 1
        arenas = []
        for views in (1, 2):
            shape = (views, *view.shape[1:])
            with self._lock:
                arenas.append(self._prepared(Signature(shape, view.dtype == torch.uint8, "logits")).plan().arena_bytes)
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(count, int(_FREE_SHARE * free / max(arenas[1] - arenas[0], 1))))

    def __reduce__(self):
        raise TypeError(
            "InferenceEngine: an engine cannot be pickled or copied, its memory and graphs belong to one process; "
            "make it from the model where it is used"
        )

    def __repr__(self) -> str:
        return f"InferenceEngine({self._backend.name} on {self.device}, {self.dtype}, {len(self._programs)} plans)"


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """The plan says which type each step computes in."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _device(device: torch.device | str | None, actual: torch.device) -> torch.device:
    if device is not None:
        wanted = torch.device(device)
        if wanted.type == "cuda" and wanted.index is None:
            wanted = torch.device("cuda", torch.cuda.current_device())
        if wanted != actual:
            raise ValueError(
                f"InferenceEngine: model must be on {wanted}, call model.to({str(device)!r}), got {actual}"
            )
    if actual.type not in ("cpu", "cuda"):
        raise ValueError(f"InferenceEngine: model must be on a CPU or a CUDA device, got {actual}")
    return actual


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"InferenceEngine: dtype must be torch.float32, bfloat16 or float16, got {dtype}")
    reason = unavailable_reason(device) if device.type == "cuda" else cpu_unavailable_reason(dtype)
    if reason is not None:
        raise RuntimeError(f"InferenceEngine: {reason}")


def _max_views(value: int | str | None) -> int | None:
    if value is None or value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"InferenceEngine: max_views must be a positive integer, None or 'auto', got {value!r}")
    return value


def _versions(device: torch.device) -> str:
    try:
        ours = version("slowfast-ext")
    except PackageNotFoundError:  # run from a checkout
        ours = "unknown"
    cudnn = f", cuDNN {torch.backends.cudnn.version()}" if device.type == "cuda" else ""
    return f"slowfast_ext {ours} ({_code_digest()}), torch {torch.__version__}{cudnn}"


@functools.cache
def _code_digest() -> str:
    """Of the Python and the compiled kernels that run in an engine: between two releases the version says nothing."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for part in ("engine/*.py", "ops/*.py", "_C.*") for path in package.glob(part)):
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()[:12]
