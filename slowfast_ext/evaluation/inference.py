"""A recogniser made ready to run, and run over videos."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from ..accelerate import accelerate as accelerate_model
from ..data import VideoError, VideoViews, ViewPlan, normalize, read_views
from ..engine import InferenceEngine
from ..models import SlowFastRecognizer


class PlainEngine:
    """A network's own modules, fused or not, behind the interface of the inference engine.

    Args:
        model: in evaluation mode, on the device where it is to run.
        dtype: of the arithmetic; parameters stay in theirs, other dtypes than float32 go through autocast.
        max_views: clips in one forward pass.

    A clip is a float Tensor[N, 3, T, H, W], normalised, or a uint8 Tensor[N, T, H, W, 3], raw RGB frames.
    """

    def __init__(self, model: SlowFastRecognizer, *, dtype: torch.dtype, max_views: int):
        self.model = model
        self.config = model.config
        self.dtype = dtype
        self.max_views = max_views
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def __call__(self, clip: Tensor) -> Tensor:
        """Logits: float32 Tensor[N, num_classes]."""
        return self._chunked(self.model, clip)

    @torch.inference_mode()
    def video(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """Mean over the views of one video of softmax(logits): float32 Tensor[num_classes]."""
        return self._chunked(self.model, views).softmax(1).mean(0)

    @torch.inference_mode()
    def features(self, clip: Tensor) -> Tensor:
        """The last feature maps, averaged over all positions: float32 Tensor[N, slow channels + fast channels]."""

        def pooled(clips: Tensor) -> Tensor:
            return torch.cat([maps.float().mean((2, 3, 4)) for maps in self.model.backbone(clips)], 1)

        return self._chunked(pooled, clip)

    def _chunked(self, function, views: Tensor | Sequence[Tensor]) -> Tensor:
        results = []
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for start in range(0, len(views), self.max_views):
                clips = views[start : start + self.max_views].to(self.device)
                if clips.dtype == torch.uint8:
                    clips = normalize(clips, self.config.normalization.mean, self.config.normalization.std)
                results.append(function(clips).float())
        return torch.cat(results)


def prepare(
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_views: int | None = None,
    engine: bool = True,
    accelerate: bool = True,
) -> InferenceEngine | PlainEngine:
    """The network ready to run on ``device``; ``model`` is changed: moved there, and accelerated without an engine.

    Args:
        model: a SlowFast recogniser.
        device: where it runs.
        dtype: of the arithmetic.
        max_views: clips in one forward pass; by default what the engine finds fitting, without it 10 on a GPU and 2 on
            a CPU.
        engine: make it an :class:`~slowfast_ext.InferenceEngine`; where that refuses, with a warning, go on without.
        accelerate: without an engine, put fused operators in the place of the modules they replace.

    Warnings are those of :func:`~slowfast_ext.accelerate`, and that of an engine that cannot be.
    """
    model = model.to(device).eval()
    if engine:
        try:
            return InferenceEngine(model, dtype=dtype, max_views=max_views)
        except (RuntimeError, TypeError, ValueError) as error:
            warnings.warn(f"no inference engine: {error}", stacklevel=2)
    if accelerate:
        accelerate_model(model)
    return PlainEngine(model, dtype=dtype, max_views=max_views or default_views(device))


def fold_batch_norms(model: SlowFastRecognizer) -> SlowFastRecognizer:
    """Fold each batch norm of a plain network in evaluation mode into its convolution, in place; returns the network.

    The inference engine and the fused modules do this by themselves.
    """
    for module in model.modules():
        if isinstance(getattr(module, "bn", None), nn.BatchNorm3d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), None
    return model


def video_probabilities(engine: PlainEngine | InferenceEngine, views: VideoViews) -> Tensor:
    """Mean over the views of softmax(logits): float32 Tensor[num_classes]."""
    # Views of a video share frames, so they cross to the device as these and are cut there.
    return engine.video(views.to(engine.device))


def view_features(engine: PlainEngine | InferenceEngine, views: VideoViews) -> Tensor:
    """Pooled features of each view: float32 Tensor[views, slow channels + fast channels]."""
    views = views.to(engine.device)
    at_once = engine.max_views or default_views(engine.device)
    return torch.cat([engine.features(views[start : start + at_once]) for start in range(0, len(views), at_once)])


def default_views(device: torch.device) -> int:
    """Clips in one forward pass, where the user leaves it open: enough to fill the device, few enough to fit it."""
    return 10 if device.type == "cuda" else 2


@dataclass(frozen=True)
class VideoResult:
    """What was computed from one video, or why nothing was.

    Attributes:
        path: the video.
        value (Tensor or None): on the CPU; None if there is an ``error``.
        error: one sentence that names the file, None if there is a ``value``.
        views: how many were seen.
        decode_seconds, network_seconds: how long decoding and the network took.
    """

    path: str
    value: Tensor | None = None
    error: str | None = None
    views: int = 0
    decode_seconds: float = 0.0
    network_seconds: float = 0.0


def over_videos(
    compute: Callable[[VideoViews], Tensor],
    paths: Sequence[str],
    plan: ViewPlan,
    *,
    decoder: str = "auto",
    workers: int = 1,
) -> Iterator[VideoResult]:
    """``compute`` of the views of each video, in order; videos are decoded in the background meanwhile.

    A video that cannot be read, a result that is not finite and memory that runs out become the error of that result.

    Args:
        compute: such as :func:`video_probabilities` of an engine.
        paths: video files.
        plan: which views of them.
        decoder: as :func:`~slowfast_ext.data.open_video`.
        workers: videos decoded at a time; one more waits for the network.
    """

    def decode(path: str) -> tuple[VideoViews, float]:
        start = time.perf_counter()
        views = read_views(path, plan, decoder)
        return views, time.perf_counter() - start

    pool = ThreadPoolExecutor(workers)
    try:
        remaining = iter(paths)
        # One decoded video waits for the network, no more: views of large videos are large.
        pending = deque((path, pool.submit(decode, path)) for path in islice(remaining, workers + 1))
        while pending:
            yield _result(compute, *pending.popleft())
            pending.extend((path, pool.submit(decode, path)) for path in islice(remaining, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(compute: Callable[[VideoViews], Tensor], path: str, decoding: Future) -> VideoResult:
    try:
        views, decode_seconds = decoding.result()
        start = time.perf_counter()
        value = compute(views).cpu()
    except VideoError as error:
        return VideoResult(path, error=str(error))
    except torch.OutOfMemoryError:
        return VideoResult(path, error=f"'{path}': out of GPU memory; fewer views at a time need less")
    if not value.isfinite().all():
        return VideoResult(path, error=f"'{path}': the network's results are not finite numbers")
    return VideoResult(path, value, None, len(views), decode_seconds, time.perf_counter() - start)
