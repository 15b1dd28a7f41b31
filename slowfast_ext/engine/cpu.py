"""The steps of a plan on a CPU: oneDNN as torch carries it, weights reordered once, what follows in the same pass."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .autotune import TOLERANCE, Candidate, Tuner
from .ceilings import measure_ceilings
from .network import Convolution, Network
from .plan import Fusion, Plan, Signature, Step, Value, draw_steps
from .program import POOLING, Program, fast_frames, finish, normalisation_vectors, slow_frames

# The operators that torch's own compiler calls where it freezes a network.
_convolve = torch.ops.mkldnn._convolution_pointwise.default
_convolve_onto = torch.ops.mkldnn._convolution_pointwise_.binary
_reorder = torch.ops.mkldnn._reorder_convolution_weight.default

_LANES = 16  # sums in a register of AVX-512: a convolution of fewer output channels leaves some empty
_MOST_FOLDED = 4


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, up to 1 GiB, instead of giving it back to the system each time.

    The tensors of a clip come and go in each call. Where glibc returns them to the system, their pages are zeroed and
    mapped again every time, which was measured to take 7 % of a call.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # The numbers are glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD; above 32 MiB it would map a tensor by itself.
    libc.mallopt(-1, 2**30)
    libc.mallopt(-3, 2**30)


def unavailable_reason(dtype: torch.dtype) -> str | None:
    """Why nothing is computed in ``dtype`` on this CPU, or None."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "torch has no oneDNN here, or it is switched off"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"on a CPU the engine computes in float32 or bfloat16, not in {dtype}"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no instructions for bfloat16"
    return None


class CpuBackend:
    """Makes programs for a CPU, all with the same reordered weights."""

    name = "oneDNN"
    fusion = Fusion(
        converts_clip=True,
        whole_block=lambda block, pathway, shape: "on a CPU a layer's output stays in the caches",
        pair=lambda block: False,
    )

    def __init__(self, network: Network, tuner: Tuner):
        keep_freed_memory()
        self.network, self.tuner = network, tuner
        self._reordered: dict[object, Tensor] = {}

    def program(self, signature: Signature) -> Program:
        """Choose what computes each step."""
        steps, notes = draw_steps(self.network, signature, self.fusion)
        last_uses = {value.buffer: index for index, step in enumerate(steps) for value in step.inputs}
        for index, step in enumerate(steps):
            if step.operator == "input":
                step.kernel, step.why = "copy", "in the network's type; each stem lays out what it reads"
                step.run = self._normalise() if signature.raw else self._convert
            elif step.operator == "stem":
                frames = slow_frames if step.pathway == "slow" else fast_frames
                self._choose_stem(step, frames(self.network, signature))
            elif step.operator in ("pool_head", "features"):
                step.kernel, step.why = "reductions", "in float64"
                step.run = self._finish(step.operator)
            else:
                self._choose_convolution(step, last_uses[step.inputs[-1].buffer] == index)
        return CpuProgram(self.network, signature, steps, last_uses, notes)

    def _convert(self, clip: Tensor) -> Tensor:
        # The type before the layout: torch is slower at both at once.
        return clip.to(self.network.dtype)

    def _normalise(self) -> Callable[[Tensor], Tensor]:
        scale, shift = normalisation_vectors(self.network)
        dtype = self.network.dtype
        return lambda frames: torch.addcmul(shift, frames.float(), scale).to(dtype).permute(0, 4, 1, 2, 3)

    def _finish(self, operator: str) -> Callable[[Tensor, Tensor], Tensor]:
        """In float64: sums of some thousand products in the classifier round as much as all convolutions together."""
        weight, bias = self.network.head_weight.double(), self.network.head_bias
        network = replace(self.network, head_weight=weight, head_bias=None if bias is None else bias.double())
        run = finish(network, operator)
        # From bfloat16 by way of float32: torch converts these two steps a hundred times as fast as the one.
        return lambda slow, fast: run(slow.float().double(), fast.float().double()).float()

    def _choose_convolution(self, step: Step, last_use: bool) -> None:
        (convolution,) = step.convolutions
        if len(step.inputs) == 1 and _leaves_lanes_empty(convolution):
            self._choose_pixels(step)
            return
        geometry = (convolution.padding, convolution.stride, (1, 1, 1), 1)
        if convolution not in self._reordered:
            self._reordered[convolution] = _reorder(convolution.weight, *geometry, step.inputs[0].shape)
            convolution.weight = convolution.weight.to("meta")  # its shape is still asked for, its numbers are not
        weight, bias = self._reordered[convolution], convolution.bias
        activation = "relu" if convolution.relu else "none"
        step.kernel, step.why = "oneDNN convolution", "weights reordered"
        if len(step.inputs) == 1:
            step.run = lambda x: _convolve(x, weight, bias, *geometry, activation, [], "")
            return
        step.why += ", added in place" if last_use else ""
        activation = "relu" if convolution.relu else None
        bias = None if bias is None else bias.to(self.network.dtype)  # which this operator wants

        def run(x: Tensor, shortcut: Tensor) -> Tensor:
            target = shortcut if last_use else shortcut.clone(memory_format=torch.channels_last_3d)
            return _convolve_onto(target, x, weight, bias, *geometry, "add", None, activation, [], None)

        step.run = run

    def _choose_pixels(self, step: Step) -> None:
        """Few output channels leave lanes empty: then two neighbours in a row may be computed as further channels.

        Of the fast pathway's 3x3 convolutions of 8 channels that takes a third of the time.
        """
        (convolution,) = step.convolutions
        shape = step.inputs[0].shape
        runs = {"oneDNN convolution": _pixels(convolution, shape, 1)}
        if step.outputs[0].shape[4] % 2 == 0:  # the first is taken without tuning
            runs = {"oneDNN convolution, 2 pixels at once": _pixels(convolution, shape, 2)} | runs
        sample = torch.randn((1, *shape[1:])).to(self.network.dtype, memory_format=torch.channels_last_3d)
        step.kernel, step.why = self.tuner.choose(
            f"convolution {shape[1:]} {tuple(convolution.weight.shape)} {convolution.stride} {convolution.padding} "
            f"{self.network.dtype}",
            [Candidate(name, lambda run=run: run(sample)) for name, run in runs.items()],
            lambda: _plain_convolution(convolution, sample),
            TOLERANCE[self.network.dtype],
        )
        step.run = runs[step.kernel]

    def _choose_stem(self, step: Step, frames: list[int] | None) -> None:
        """Few output channels leave lanes empty: then some neighbouring frames are computed as further channels."""
        (stem,) = step.convolutions
        (clip,), (output,) = step.inputs, step.outputs
        channels, length = output.shape[1:3]
        folds = [fold for fold in (1, 2, _MOST_FOLDED) if length % fold == 0 and fold * channels <= 2 * _LANES]
        folds = folds if channels < _LANES else [1]
        folds = [fold for fold in folds if _sums_apart(stem, fold, length)] or folds
        folds.sort(key=lambda fold: abs(fold * channels - _LANES))  # the first is taken without tuning
        runs = {}
        for fold in folds:
            runs[f"oneDNN convolution, {fold} frames at once" if fold > 1 else "oneDNN convolution"] = self._stem(
                stem, clip.shape, frames, fold
            )
        sample = torch.randn((1, *clip.shape[1:])).to(self.network.dtype)
        key = f"stem {clip.shape[1:]} {tuple(stem.weight.shape)} frames {frames} {self.network.dtype}"
        step.kernel, step.why = self.tuner.choose(
            key,
            [Candidate(name, lambda run=run: run(sample)) for name, run in runs.items()],
            lambda: _plain_stem(stem, _select(sample, frames)),
            TOLERANCE[self.network.dtype],
        )
        step.why += ", maximum before ReLU"
        step.run = runs[step.kernel]

    def _stem(
        self, stem: Convolution, shape: tuple[int, ...], frames: list[int] | None, fold: int
    ) -> Callable[[Tensor], Tensor]:
        """``fold`` frames of the output are computed from these and a few neighbours, as channels.

        In float32 the products with earlier, own and later frames are three sums: oneDNN adds all products of a
        convolution in one chain, and the rounding in that of the fast stem, 735 long, is most of a network's error.
        Else, if these are as many as the neighbours on either side, the frames of the input become channels too: the
        same products, but from 6 channels, on which oneDNN is faster than on 3.
        """
        reach = stem.padding[0]
        length = shape[2] if frames is None else len(frames)
        weight = _neighbours(stem.weight, fold, 2)
        sizes = (shape[0], 3, length, *shape[3:])
        apart = _sums_apart(stem, fold, length)
        grouped = 1 < fold == reach and stem.weight.shape[2] == 2 * reach + 1 and not apart
        if grouped:  # (fold * K, fold * 3, 3, height, width): earlier, own and later frames
            weight = weight.unflatten(2, (3, fold)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
            sizes = (shape[0], fold * 3, length // fold, *shape[3:])
        padding = (0 if apart else 1 if grouped else reach, *stem.padding[1:])
        geometry = (padding, (1 if grouped else fold, *stem.stride[1:]), (1, 1, 1), 1)
        parts = weight.split((reach, fold, reach), 2) if apart else (weight,)
        weights = [_reordered(part, geometry, sizes) for part in parts]
        earlier, own, later = weights if apart else (None, *weights, None)
        bias = None if stem.bias is None else stem.bias.repeat(fold)
        onto = (None, *geometry, "add", None, None, [], None)

        def run(clip: Tensor) -> Tensor:
            x = _group(clip, frames, fold) if grouped else _select(clip, frames)
            y = _convolve(x, own, bias, *geometry, "none", [], "")
            if apart:
                for one, target in zip(x.split(1), y.split(1), strict=True):  # of one clip, frames are views
                    _convolve_onto(target[:, :, 1:], one[:, :, fold - reach : -fold], earlier, *onto)
                    _convolve_onto(target[:, :, :-1], one[:, :, fold:], later, *onto)
            # oneDNN's ReLU makes 0 of NaN, torch's does not; the maximum commutes with both.
            return _apart(F.max_pool3d(y, *POOLING).relu_(), fold, 2)

        return run


class CpuProgram(Program):
    """Runs steps one after the other and frees each tensor after its last use."""

    def __init__(
        self,
        network: Network,
        signature: Signature,
        steps: Sequence[Step],
        last_uses: dict[Value, int],
        notes: tuple[str, ...],
    ):
        self.signature, self.steps, self._network, self.notes = signature, steps, network, notes
        self._finished: list[list[Value]] = [[] for _ in steps]
        for buffer, index in last_uses.items():
            self._finished[index].append(buffer)

    def __call__(self, clip: Tensor) -> Tensor:
        tensors: dict[Value, Tensor] = {self.steps[0].inputs[0]: clip}
        not_finite = None
        for step, finished in zip(self.steps, self._finished, strict=True):
            (output,) = step.outputs
            result = step.run(*(tensors[value] for value in step.inputs))
            if output.parent is None:
                tensors[output] = result
            else:
                self._part(tensors, output).copy_(result)
            if step.operator == "stem" and step.pathway == "fast":
                not_finite = result.sum((1, 2, 3, 4), dtype=torch.float32) * 0  # NaN where the clip has one
            for buffer in finished:
                del tensors[buffer]
        return result + not_finite[:, None]

    def _part(self, tensors: dict[Value, Tensor], value: Value) -> Tensor:
        joined = value.parent
        if joined not in tensors:
            n, channels, *sizes = joined.shape
            tensors[joined] = torch.empty(n, *sizes, channels, dtype=joined.dtype).permute(0, 4, 1, 2, 3)
        return tensors[joined][:, value.offset : value.offset + value.shape[1]]

    def plan(self) -> Plan:
        dtype = self._network.dtype
        title = f"{CpuBackend.name} on {self._network.device}, {dtype}, clip {self.signature.shape}"
        return Plan(title, self.steps, {}, 0, measure_ceilings(self._network.device, dtype), self.notes)


def _select(clip: Tensor, frames: list[int] | None) -> Tensor:
    """Some frames of a clip, or all, in channels_last_3d."""
    if frames is None:
        return clip.contiguous(memory_format=torch.channels_last_3d)
    pictures = clip.permute(0, 2, 3, 4, 1)
    return torch.cat([pictures[:, frame : frame + 1] for frame in frames], 1).permute(0, 4, 1, 2, 3)


def _group(clip: Tensor, frames: list[int] | None, fold: int) -> Tensor:
    """The same with ``fold`` neighbours as channels: (N, fold * 3, T / fold, H, W)."""
    clip = clip if frames is None else clip[:, :, frames]
    planes = [plane for each in clip.unflatten(2, (-1, fold)).unbind(3) for plane in each.unbind(1)]
    return torch.stack(planes, -1).permute(0, 4, 1, 2, 3)


def _sums_apart(stem: Convolution, fold: int, length: int) -> bool:
    """Whether sums over earlier, own and later frames are taken one by one, where ``fold`` frames are computed at once.

    The kernel reaches no further than to the neighbouring ``fold`` frames, so no part of a sum needs half its padding.
    """
    reach = stem.padding[0]
    return stem.weight.dtype == torch.float32 and 0 < reach <= fold < length and stem.weight.shape[2] == 2 * reach + 1


def _neighbours(weight: Tensor, fold: int, axis: int) -> Tensor:
    """(K, C, ...) -> (fold * K, C, ...): the outputs at ``fold`` places along ``axis``, each beginning one later."""
    sizes = list(weight.shape)
    sizes[axis] += fold - 1
    folded = weight.new_zeros(fold, *sizes)
    for place in range(fold):
        folded[place].narrow(axis, place, weight.shape[axis]).copy_(weight)
    return folded.flatten(0, 1)


def _apart(y: Tensor, fold: int, axis: int) -> Tensor:
    """What :func:`_neighbours` put into channels, back at its places; a view where these are pixels of a row."""
    if fold == 1:
        return y
    y = y.unflatten(1, (fold, -1)).permute(0, 3, 4, 5, 1, 2)  # N, T, H, W, fold, K
    return y.movedim(4, axis).flatten(axis - 1, axis).permute(0, 4, 1, 2, 3)


def _reordered(weight: Tensor, geometry: tuple, sizes: Sequence[int]) -> Tensor:
    return _reorder(weight.contiguous(memory_format=torch.channels_last_3d), *geometry, sizes)


def _leaves_lanes_empty(convolution: Convolution) -> bool:
    """And two pixels at once would fill them; not with a kernel of one pixel, half of whose products would be zeros."""
    channels, *_, width = convolution.weight.shape
    return 2 * channels <= _LANES and width > 1 == convolution.stride[2]


def _pixels(convolution: Convolution, sizes: Sequence[int], fold: int) -> Callable[[Tensor], Tensor]:
    """A convolution with ``fold`` pixels of a row at once, which without copying are its output."""
    geometry = (convolution.padding, (*convolution.stride[:2], fold), (1, 1, 1), 1)
    weight = _reordered(_neighbours(convolution.weight, fold, 4), geometry, sizes)
    bias = None if convolution.bias is None else convolution.bias.repeat(fold)
    activation = "relu" if convolution.relu else "none"
    return lambda x: _apart(_convolve(x, weight, bias, *geometry, activation, [], ""), fold, 4)


def _plain_convolution(convolution: Convolution, x: Tensor) -> Tensor:
    bias = None if convolution.bias is None else convolution.bias.float()
    y = F.conv3d(x.float(), convolution.weight.float(), bias, convolution.stride, convolution.padding)
    return y.relu() if convolution.relu else y


def _plain_stem(stem: Convolution, clip: Tensor) -> Tensor:
    return F.max_pool3d(_plain_convolution(stem, clip).relu(), *POOLING)
