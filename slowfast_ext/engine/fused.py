"""The steps of a plan in this package's operators, in one arena: for GPUs, and for tests on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops.conv3d_bn_relu import TILES
from .autotune import TOLERANCE, Candidate, Tuner
from .ceilings import measure_ceilings
from .memory import Arena
from .network import Block, Convolution, Network
from .plan import Fusion, Plan, Signature, Step, draw_steps
from .program import POOLING, Program, fast_frames, finish, normalisation_vectors, slow_frames

Run = Callable[[], object]


class FusedBackend:
    """Makes programs of fused operators; one arena a program.

    Args:
        network: whose weights are used as they are: in its type, channels_last_3d.
        tuner: chooses between these operators and what torch has.
        cuda_graph: whether programs are captured; only where the network is on a GPU.
    """

    name = "slowfast_ext"

    def __init__(self, network: Network, tuner: Tuner, cuda_graph: bool):
        self.network, self.tuner, self.cuda_graph = network, tuner, cuda_graph
        self._normalisation = normalisation_vectors(network)

    def program(self, signature: Signature) -> Program:
        """Place the buffers, choose what computes each step, and capture the whole if asked to."""
        fusion = Fusion(False, self._reason_against_whole_block, pair=lambda block: True)
        steps, notes = draw_steps(self.network, signature, fusion)
        arena = Arena(steps, self.network.device)
        for step in steps:
            self._choose(step, arena, signature)
        return ArenaProgram(self, signature, steps, arena, notes)

    def _reason_against_whole_block(self, block: Block, pathway: str, shape: tuple[int, ...]) -> str | None:
        if pathway == "slow":
            return "a slow block's weights do not fit on chip"
        if len(block.branch) != 3:
            return "not a bottleneck"
        first, second, _ = block.branch
        if (first.stride, second.stride[0]) != ((1, 1, 1), 1) or second.stride[1] != second.stride[2]:
            return "strides are not those of a bottleneck"
        return ops.fast_bottleneck_reason_against(
            shape[1],
            first.weight.shape[0],
            stride=second.stride[1],
            projection=block.shortcut is not None,
            temporal_kernel=first.weight.shape[2],
            dtype=self.network.dtype,
            device=self.network.device,
        )

    def _choose(self, step: Step, arena: Arena, signature: Signature) -> None:
        """Fill in ``kernel``, ``why`` and ``run``, a function without arguments on the tensors of the arena."""
        inputs = [arena.tensor(value) for value in step.inputs]
        outputs = [arena.tensor(value) for value in step.outputs]
        step.kernel, step.why = f"ops.{step.operator}", "one launch"
        if step.operator == "stem":
            self._choose_stem(step, inputs[0], outputs[0], signature)
        elif step.operator == "conv3d_bn_relu":
            self._choose_convolution(step, inputs, outputs[0])
        elif step.operator == "conv3d_bn_relu_pair":
            self._choose_pair(step, inputs[0], outputs)
        elif step.operator == "fast_bottleneck":
            step.run, step.why = self._bottleneck(step, inputs[0], outputs[0]), "intermediates stay on chip"
        elif step.operator == "lateral_fuse":
            (lateral,) = step.convolutions
            step.run = lambda: ops.lateral_fuse_into(
                inputs[0], lateral.weight, lateral.bias, stride=lateral.stride[0], relu=lateral.relu, out=outputs[0]
            )
        else:
            last = finish(self.network, step.operator)
            step.kernel = "ops.pool_head" if step.operator == "pool_head" else "torch reductions"
            step.why = "in float32"
            step.run = lambda: outputs[0].copy_(last(*inputs))

    def _choose_stem(self, step: Step, clip: Tensor, out: Tensor, signature: Signature) -> None:
        (stem,) = step.convolutions
        pathway, frames = (
            (self.network.slow, slow_frames) if step.pathway == "slow" else (self.network.fast, fast_frames)
        )
        frames = frames(self.network, signature)
        index = None if frames is None else torch.tensor(frames, device=self.network.device)
        scale, shift = self._normalisation if signature.raw else (None, None)
        if pathway.stem_reason is None:
            step.run = lambda: ops.stem(clip, stem.weight, stem.bias, frames=index, scale=scale, shift=shift, out=out)
            return
        step.kernel, step.why = "ops.conv3d_bn_relu, torch max_pool3d", pathway.stem_reason
        geometry = {"stride": stem.stride, "padding": stem.padding, "relu": stem.relu}

        def run() -> None:
            x = clip.permute(0, 4, 1, 2, 3) if signature.raw else clip
            x = x if index is None else x.index_select(2, index)
            if signature.raw:
                x = x * scale.view(3, 1, 1, 1) + shift.view(3, 1, 1, 1)
            y = ops.conv3d_bn_relu(x.to(out.dtype), stem.weight, stem.bias, **geometry)
            out.copy_(F.max_pool3d(y, *POOLING))

        step.run = run

    def _bottleneck(self, step: Step, x: Tensor, out: Tensor) -> Run:
        operands = [tensor for part in step.convolutions for tensor in (part.weight, part.bias)]
        stride = step.convolutions[1].stride[1]
        return lambda: ops.fast_bottleneck(x, *operands, stride=stride, out=out)

    def _choose_pair(self, step: Step, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """One launch, or each convolution as it is best by itself."""
        first, shortcut = step.convolutions
        operands = (first.weight, first.bias, shortcut.weight, shortcut.bias)
        options = {
            "stride": first.stride,
            "padding": first.padding,
            "stride_shortcut": shortcut.stride,
            "padding_shortcut": shortcut.padding,
            "out": outputs[0],
            "out_shortcut": outputs[1],
        }
        singles = [
            self._tuned(convolution, [x], out) for convolution, out in zip(step.convolutions, outputs, strict=True)
        ]
        runs = {
            "ops.conv3d_bn_relu_pair": lambda: ops.conv3d_bn_relu_pair(x, *operands, **options),
            " and ".join(name for name, *_ in singles): lambda: [run() for *_, run in singles],
        }

        def result(run: Run) -> Tensor:
            run()
            return torch.cat([out.flatten() for out in outputs])

        step.kernel, step.why = self.tuner.choose(
            " and ".join(
                self._key(convolution, [x], out) for convolution, out in zip(step.convolutions, outputs, strict=True)
            ),
            [Candidate(name, lambda run=run: result(run)) for name, run in runs.items()],
            lambda: torch.cat([_plain(convolution, x, None).flatten() for convolution in (first, shortcut)]),
            self._limit(x),
        )
        step.run = runs[step.kernel]

    def _choose_convolution(self, step: Step, inputs: Sequence[Tensor], out: Tensor) -> None:
        (convolution,) = step.convolutions
        step.kernel, step.why, step.run = self._tuned(convolution, inputs, out)

    def _tuned(self, convolution: Convolution, inputs: Sequence[Tensor], out: Tensor) -> tuple[str, str, Run]:
        """Name, reason and function of what computes ``out`` fastest."""
        residual = inputs[1] if len(inputs) == 2 else None
        runs = dict(_convolution_runs(convolution, inputs[0], residual, out))
        if self.tuner.enabled:
            for tensor in inputs:  # what the arena holds before the first call may be anything
                tensor.normal_()

        def result(run: Run) -> Tensor:
            run()
            return out

        name, why = self.tuner.choose(
            self._key(convolution, inputs, out),
            [Candidate(name, lambda run=run: result(run)) for name, run in runs.items()],
            lambda: _plain(convolution, inputs[0], residual),
            self._limit(out),
        )
        return name, why, runs[name]

    def _key(self, convolution: Convolution, inputs: Sequence[Tensor], out: Tensor) -> str:
        pitches = [tensor.stride(4) for tensor in (*inputs, out)]
        return (
            f"conv3d_bn_relu {tuple(inputs[0].shape)} {tuple(convolution.weight.shape)} stride {convolution.stride} "
            f"padding {convolution.padding} pitches {pitches} relu {convolution.relu} {out.dtype}"
            + (" tf32" if _uses_tf32(out) else "")
        )

    def _limit(self, out: Tensor) -> float:
        return TOLERANCE["tf32" if _uses_tf32(out) else out.dtype]


def _uses_tf32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32"


def _convolution_runs(
    convolution: Convolution, x: Tensor, residual: Tensor | None, out: Tensor
) -> Iterator[tuple[str, Run]]:
    """The ways to compute ``out``, by name. The first is the one taken without tuning."""
    weight, bias, relu = convolution.weight, convolution.bias, convolution.relu
    geometry = {"stride": convolution.stride, "padding": convolution.padding}
    yield "ops.conv3d_bn_relu", lambda: ops.conv3d_bn_relu(x, weight, bias, residual, **geometry, relu=relu, out=out)
    if x.is_cuda:
        for tile, splits in _tiles(convolution, x, out):
            yield (
                f"ops.conv3d_bn_relu {tile}" + (f" / {splits}" if splits > 1 else ""),
                lambda tile=tile, splits=splits: ops.conv3d_bn_relu(
                    x, weight, bias, residual, **geometry, relu=relu, out=out, tile=(tile, splits)
                ),
            )
    narrow_bias = None if bias is None else bias.to(x.dtype)

    def pointwise() -> None:
        y = F.conv3d(x, weight, narrow_bias, **geometry)
        y = y if residual is None else y.add_(residual)
        torch.clamp_min(y, 0, out=out) if relu else out.copy_(y)

    yield "torch conv3d + pointwise", pointwise
    if x.is_cuda and relu:
        arguments = (convolution.stride, convolution.padding, (1, 1, 1), 1)
        if residual is None:
            yield (
                "cudnn_convolution_relu",
                lambda: out.copy_(torch.cudnn_convolution_relu(x, weight, narrow_bias, *arguments)),
            )
        else:
            yield (
                "cudnn_convolution_add_relu",
                lambda: out.copy_(torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, narrow_bias, *arguments)),
            )
    dense = x.is_contiguous(memory_format=torch.channels_last_3d)
    if dense and weight[0, 0].numel() == 1 and convolution.stride == (1, 1, 1) and convolution.padding == (0, 0, 0):
        matrix = weight.flatten(1).T
        pixels = x.permute(0, 2, 3, 4, 1).flatten(0, 3)
        target = out.permute(0, 2, 3, 4, 1)

        def gemm() -> None:
            if relu and residual is None and narrow_bias is not None:
                y = torch._addmm_activation(narrow_bias, pixels, matrix)
            else:
                y = torch.mm(pixels, matrix) if narrow_bias is None else torch.addmm(narrow_bias, pixels, matrix)
            y = y.view(target.shape)
            if residual is not None:
                y = y.add_(residual.permute(0, 2, 3, 4, 1)).relu_() if relu else y.add_(residual.permute(0, 2, 3, 4, 1))
            target.copy_(y)

        yield "GEMM + pointwise", gemm


def _tiles(convolution: Convolution, x: Tensor, out: Tensor) -> Iterator[tuple[str, int]]:
    """Tiles that suit the layer, and splits of its sums where tiles alone would leave multiprocessors idle."""
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    pixels = out.numel() // out.shape[1]
    steps = -(-convolution.weight[0].numel() * x.element_size() // 64)
    for tile in TILES:
        height, width = map(int, tile.split("x"))
        if width >= 2 * max(out.shape[1], 16):  # half of it would be empty
            continue
        tiles = -(-pixels // height) * -(-out.shape[1] // width)
        for splits in (1, 2, 4, 8, 16):
            if splits == 1 or (4 * splits <= steps and tiles * splits <= 2 * multiprocessors):
                yield tile, splits


def _plain(convolution: Convolution, x: Tensor, residual: Tensor | None) -> Tensor:
    bias = None if convolution.bias is None else convolution.bias.float()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = F.conv3d(x.float(), convolution.weight.float(), bias, convolution.stride, convolution.padding)
    y = y if residual is None else y + residual.float()
    return y.relu() if convolution.relu else y


class ArenaProgram(Program):
    """Steps on fixed tensors: the pathways on two streams of a GPU, all of it in a CUDA graph."""

    def __init__(
        self,
        backend: FusedBackend,
        signature: Signature,
        steps: Sequence[Step],
        arena: Arena,
        notes: tuple[str, ...],
    ):
        self.signature, self.steps, self.notes = signature, steps, notes
        self._backend, self._arena = backend, arena
        self._clip = arena.tensor(next(step.inputs[0] for step in steps if step.operator == "stem"))
        self._result = arena.tensor(steps[-1].outputs[0])
        self._waits = [self._awaited(index) for index in range(len(steps))]
        self._device = backend.network.device
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        if self._side is not None and backend.cuda_graph:
            self._capture()

    def __call__(self, clip: Tensor) -> Tensor:
        self._clip.copy_(clip, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._launch()
        return self._result.clone()

    def _awaited(self, index: int) -> list[int]:
        """The steps of the other pathway whose results step ``index`` reads."""
        step = self.steps[index]
        read = {value.buffer for value in step.inputs}
        return [
            other
            for other, producer in enumerate(self.steps[:index])
            if producer.pathway != step.pathway and any(value.buffer in read for value in producer.outputs)
        ]

    def _launch(self) -> None:
        if self._side is None:
            for step in self.steps:
                step.run()
            return
        main = torch.cuda.current_stream(self._device)
        streams = {"slow": main, "fast": self._side}
        awaited = {other for waits in self._waits for other in waits}
        events: dict[int, torch.cuda.Event] = {}
        self._side.wait_stream(main)  # the clip
        for index, (step, waits) in enumerate(zip(self.steps, self._waits, strict=True)):
            for other in waits:
                streams[step.pathway].wait_event(events[other])
            with torch.cuda.stream(streams[step.pathway]):
                step.run()
            if index in awaited:
                events[index] = streams[step.pathway].record_event()
        main.wait_stream(self._side)

    def _capture(self) -> None:
        self._launch()  # allocates the libraries' workspaces, which a capture may not
        torch.cuda.synchronize(self._device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._launch()

    def plan(self) -> Plan:
        dtype = self._backend.network.dtype
        title = f"{FusedBackend.name} on {self._device}, {dtype}, clip {self.signature.shape}"
        title += ", one CUDA graph" if self._graph is not None else ""
        ceilings = measure_ceilings(self._device, dtype)
        return Plan(title, self.steps, dict(self._arena.offsets), self._arena.bytes, ceilings, self.notes)
