"""What a forward pass consists of: values, the steps that compute them, and the table that shows both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .ceilings import Ceilings
from .network import Block, Convolution, Network


@dataclass(eq=False)
class Value:
    """A tensor of the plan.

    Attributes:
        name: "slow_path.layer1.0"; a concatenation is named after the lateral connection that completes it.
        shape: (N, C, T, H, W), (N, T, H, W, 3) for raw frames, or (N, C).
        parent, offset: the concatenation whose channels, from ``offset`` on, this value is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parent: Value | None = None
    offset: int = 0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def buffer(self) -> Value:
        """The value that owns the memory."""
        return self if self.parent is None else self.parent

    def channels(self, name: str, offset: int, count: int) -> Value:
        """Some channels of this value, as a value of their own."""
        return Value(name, (self.shape[0], count, *self.shape[2:]), self.dtype, self, offset)


@dataclass(eq=False)
class Step:
    """One kernel, or one call of a library.

    Attributes:
        layer: of the network.
        operator: what is computed: one of ``slowfast_ext.ops``, or ``input``.
        inputs, outputs: in the operator's order.
        pathway: "slow" or "fast": steps of one run one after the other.
        convolutions: whose weights are used.
        operations: 2 a multiply-accumulate.
        bytes: of inputs that are read, outputs and weights, each once.
        kernel, why: what computes it and why that; a backend fills them in.
        run: called with the input tensors, then the output tensors; what it returns takes their place if not None.
    """

    layer: str
    operator: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    pathway: str
    convolutions: tuple[Convolution, ...] = ()
    operations: int = 0
    bytes: int = 0
    kernel: str = ""
    why: str = ""
    run: Callable[..., Tensor | tuple[Tensor, ...] | None] | None = None


@dataclass(frozen=True)
class Signature:
    """What a plan is made for.

    Attributes:
        shape: of the clip: (N, 3, T, H, W), or (N, T, H, W, 3) if ``raw``.
        raw: uint8 frames instead of normalised floats.
        output: "logits" or "features".
    """

    shape: tuple[int, ...]
    raw: bool
    output: str

    @property
    def clip(self) -> tuple[int, int, int, int]:
        """N, T, H, W."""
        n, *sizes = self.shape
        return (n, *(sizes[:3] if self.raw else sizes[1:]))


@dataclass(frozen=True)
class Fusion:
    """Which layers a backend computes in one step. Each function gets what it decides about.

    Attributes:
        converts_clip: whether a step of its own brings the clip into the network's type and channels_last_3d.
        whole_block: why a block of a pathway is not one step, or None if it is.
        pair: whether the first convolution and the shortcut of a block are one step.
    """

    converts_clip: bool
    whole_block: Callable[[Block, str, tuple[int, ...]], str | None]
    pair: Callable[[Block], bool]


def draw_steps(network: Network, signature: Signature, fusion: Fusion) -> tuple[list[Step], tuple[str, ...]]:
    """The steps of a forward pass, in an order in which they can run, and what is to be said of them all.

    Their kernels are not chosen yet.
    """
    drawing = _Drawing(network, signature, fusion)
    return drawing.steps, tuple(
        f"{count} blocks of the {pathway} pathway layer by layer: {reason}"
        for (pathway, reason), count in drawing.reasons.items()
    )


class _Drawing:
    def __init__(self, network: Network, signature: Signature, fusion: Fusion):
        self.network, self.fusion, self.steps = network, fusion, []
        self.reasons: Counter[tuple[str, str]] = Counter()
        n, frames, height, width = signature.clip
        config = network.config
        clip = Value("clip", signature.shape, torch.uint8 if signature.raw else network.dtype)
        if fusion.converts_clip:
            given, clip = clip, Value("normalised clip", (n, 3, frames, height, width), network.dtype)
            self.add("clip", "input", (given,), clip, "fast")
        slow_frames = frames // config.resample_rate
        fast_frames = slow_frames * config.speed_ratio
        joined = self.join(0, (n, network.slow.stem.weight.shape[0], slow_frames, _quarter(height), _quarter(width)))
        slow = self.stem(network.slow.stem, clip, slow_frames, "slow", joined)
        fast = self.stem(network.fast.stem, clip, fast_frames, "fast", None)
        for stage, lateral in enumerate(network.laterals):
            self.lateral(lateral, fast, joined)
            for index, block in enumerate(network.slow.stages[stage]):
                source, joined_next = joined if index == 0 else slow, None
                if stage < 3 and index == len(network.slow.stages[stage]) - 1:
                    joined_next = self.join(stage + 1, self.block_shape(block, source.shape))
                slow = self.block(block, source, "slow", joined_next)
            joined = joined_next
            for block in network.fast.stages[stage]:
                fast = self.block(block, fast, "fast", None)
        channels = slow.shape[1] + fast.shape[1]
        if signature.output == "features":
            self.add("cls_head", "features", (slow, fast), Value("features", (n, channels), torch.float32), "slow")
            return
        weight = network.head_weight
        logits = Value("logits", (n, weight.shape[0]), torch.float32)
        self.add("cls_head", "pool_head", (slow, fast), logits, "slow")
        self.steps[-1].operations += 2 * n * weight.numel()
        self.steps[-1].bytes += weight.numel() * weight.element_size()

    def add(
        self,
        layer: str,
        operator: str,
        inputs: tuple[Value, ...],
        output: Value | tuple[Value, ...],
        pathway: str,
        convolutions: tuple[Convolution, ...] = (),
        shapes: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        """``shapes``: of the convolutions' outputs, in their order."""
        outputs = output if isinstance(output, tuple) else (output,)
        operations = sum(
            2 * math.prod(shape) * convolution.weight[0].numel()
            for convolution, shape in zip(convolutions, shapes, strict=True)
        )
        moved = sum(value.bytes for value in (*inputs, *outputs))
        moved += sum(convolution.weight.numel() * convolution.weight.element_size() for convolution in convolutions)
        if len(convolutions) == 1:  # a stride longer than the kernel skips input
            convolution = convolutions[0]
            for kernel, step in zip(convolution.weight.shape[2:], convolution.stride, strict=True):
                moved -= inputs[0].bytes - inputs[0].bytes * min(kernel, step) // step
        self.steps.append(Step(layer, operator, inputs, outputs, pathway, convolutions, operations, moved))

    def join(self, stage: int, shape: tuple[int, ...]) -> Value:
        """The concatenation in front of a stage; ``shape`` is that of its slow part."""
        lateral = self.network.laterals[stage]
        n, channels, *sizes = shape
        return Value(f"{lateral.name} (joined)", (n, channels + lateral.weight.shape[0], *sizes), self.network.dtype)

    def place(self, name: str, shape: tuple[int, ...], joined: Value | None) -> Value:
        """A value of its own, or the first channels of ``joined``."""
        return Value(name, shape, self.network.dtype) if joined is None else joined.channels(name, 0, shape[1])

    def stem(self, stem: Convolution, clip: Value, frames: int, pathway: str, joined: Value | None) -> Value:
        n, (height, width) = clip.shape[0], clip.shape[2:4] if clip.dtype == torch.uint8 else clip.shape[3:]
        channels = stem.weight.shape[0]
        output = self.place(stem.name, (n, channels, frames, _quarter(height), _quarter(width)), joined)
        shape = stem.output_shape((n, 3, frames, height, width))
        self.add(stem.name, "stem", (clip,), output, pathway, (stem,), (shape,))
        # A pathway reads its own frames only.
        step = self.steps[-1]
        length = clip.shape[1] if clip.dtype == torch.uint8 else clip.shape[2]
        weights = stem.weight.numel() * stem.weight.element_size()
        step.bytes = clip.bytes * frames // length + output.bytes + weights
        return output

    def lateral(self, lateral: Convolution, fast: Value, joined: Value) -> None:
        channels = lateral.weight.shape[0]
        output = joined.channels(lateral.name, joined.shape[1] - channels, channels)
        # With the fast pathway: the fast features need not wait for the slow pathway to be freed.
        self.add(lateral.name, "lateral_fuse", (fast,), output, "fast", (lateral,), (output.shape,))

    def block_shape(self, block: Block, shape: tuple[int, ...]) -> tuple[int, ...]:
        for convolution in block.branch:
            shape = convolution.output_shape(shape)
        return shape

    def block(self, block: Block, x: Value, pathway: str, joined: Value | None) -> Value:
        dtype, shapes = self.network.dtype, [x.shape]
        for convolution in block.branch:
            shapes.append(convolution.output_shape(shapes[-1]))
        output = self.place(block.name, shapes[-1], joined)
        reason = self.fusion.whole_block(block, pathway, x.shape)
        if reason is None:
            convolutions = block.branch if block.shortcut is None else (*block.branch, block.shortcut)
            sizes = (*shapes[1:], shapes[-1]) if block.shortcut is not None else tuple(shapes[1:])
            self.add(block.name, "fast_bottleneck", (x,), output, pathway, convolutions, sizes)
            return output
        self.reasons[pathway, reason] += 1
        *first, last = block.branch
        values = [Value(part.name, shape, dtype) for part, shape in zip(first, shapes[1:], strict=False)]
        shortcut, start = x, 0
        if block.shortcut is not None:
            shortcut = Value(block.shortcut.name, shapes[-1], dtype)
            if self.fusion.pair(block):
                both, sizes = (first[0], block.shortcut), (values[0].shape, shortcut.shape)
                self.add(first[0].name, "conv3d_bn_relu_pair", (x,), (values[0], shortcut), pathway, both, sizes)
                start = 1
            else:
                self.convolution(block.shortcut, (x,), shortcut, pathway)
        for index, convolution in enumerate(first[start:], start=start):
            self.convolution(convolution, (x if index == 0 else values[index - 1],), values[index], pathway)
        self.convolution(last, (values[-1], shortcut), output, pathway)
        return output

    def convolution(self, convolution: Convolution, inputs: tuple[Value, ...], output: Value, pathway: str) -> None:
        self.add(convolution.name, "conv3d_bn_relu", inputs, output, pathway, (convolution,), (output.shape,))


def _quarter(size: int) -> int:
    """Of height or width: after the stem and its pooling, each of stride 2."""
    return (size + 3) // 4


@dataclass(frozen=True)
class Plan:
    """What runs for one signature; ``str()`` of it is a table.

    Attributes:
        title: device, type, backend.
        steps: in the order in which they are started.
        places: for each buffer by name: where it begins in the arena, None where memory is allocated for each call.
        arena_bytes: of the arena, 0 where there is none.
        ceilings: of the device, for the column of floors.
        notes: what else there is to know.
    """

    title: str
    steps: Sequence[Step]
    places: dict[str, int | None]
    arena_bytes: int
    ceilings: Ceilings
    notes: tuple[str, ...] = field(default=())

    def floor_seconds(self, step: Step) -> float:
        """The longer of the times for operations and bytes (Williams et al., "Roofline", CACM 2009)."""
        return max(step.operations / self.ceilings.operations, step.bytes / self.ceilings.bandwidth)

    def __str__(self) -> str:
        header = ("layer", "kernel", "why", "buffer", "MB", "GFLOP", "floor us")
        rows = [header]
        for step in self.steps:
            buffers = []
            for value in step.outputs:
                place = self.places.get(value.buffer.name)
                at = "" if place is None else f" @{place}"
                channels = f"[{value.offset}:{value.offset + value.shape[1]}]" if value.parent is not None else ""
                buffers.append(f"{value.buffer.name}{channels}{at}")
            figures = (step.bytes / 1e6, step.operations / 1e9, 1e6 * self.floor_seconds(step))
            rows.append(
                (step.layer, step.kernel, step.why, ", ".join(buffers), *(f"{figure:.3g}" for figure in figures))
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [self.title]
        for row in rows:
            cells = (
                f"{cell:<{width}}" if column < 4 else f"{cell:>{width}}"
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join(cells).rstrip())
        total = (sum(step.bytes for step in self.steps) / 1e6, sum(step.operations for step in self.steps) / 1e9)
        floor = sum(map(self.floor_seconds, self.steps))
        lines.append(
            f"{len(self.steps)} steps, {total[0]:.4g} MB, {total[1]:.4g} GFLOP, "
            f"floor {1e3 * floor:.4g} ms one after the other"
        )
        if self.arena_bytes:
            lines.append(f"arena of {self.arena_bytes / 1e6:.4g} MB for {len(self.places)} buffers")
        return "\n".join([*lines, *self.notes])
