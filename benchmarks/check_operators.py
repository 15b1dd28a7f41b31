"""Small calls of every operator, compared with its reference: what the sanitizers of gpu_check.sh run.

    python benchmarks/check_operators.py
    compute-sanitizer --error-exitcode 1 python benchmarks/check_operators.py --device cuda --dtype bfloat16 'stem*'

Inputs, references (in float64) and comparisons are the CPU's, so that on a GPU nothing runs but copies and the
operators' own kernels. Exit status: 0; 1 if a case was wrong or failed; 2 for bad options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

import torch
import torch.nn.functional as F
from latency import DTYPES, check_device, refusing
from report import format_table
from torch import Tensor
from variants import first_lines

import slowfast_ext
from slowfast_ext import ops
from slowfast_ext.ops import batch_norm

# Largest |output - reference| / max |reference|, by the type of the output. In 16 bits four roundoffs: of the output,
# and of intermediates, which are several times smaller than its largest value. In float32 the sum of some hundred
# terms, each of them three TF32 products. One wrong term in a hundred makes 3e-2.
LIMITS = {torch.float32: 2**-16, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        operator: its name in ``slowfast_ext.ops``.
        reference: what it is compared with, a function of the same tensors, in order.
        tensors: arguments by name: shapes of random ones, float32 where they have one dimension, as biases have; or
            the tensors themselves.
        keywords: the other arguments.
        out_channels: if not 0, the operator writes as many, into the middle of a wider tensor.
        dtypes: that there are kernels for.
        of_rounded: whether all results are of values rounded to the type of the tensors, those in float32 too.
    """

    operator: str
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: dict[str, tuple[int, ...] | Tensor]
    keywords: dict = field(default_factory=dict)
    out_channels: int = 0
    dtypes: tuple[str, ...] = tuple(DTYPES)
    of_rounded: bool = False


def _fast_bottleneck(in_channels: int, channels: int, stride: int) -> Case:
    projection = stride > 1 or in_channels != 4 * channels
    tensors = {
        "x": (1, in_channels, 3, 9, 10),
        "weight_a": (channels, in_channels, 3, 1, 1),
        "bias_a": (channels,),
        "weight_b": (channels, channels, 1, 3, 3),
        "bias_b": (channels,),
        "weight_c": (4 * channels, channels, 1, 1, 1),
        "bias_c": (4 * channels,),
    }
    if projection:
        tensors |= {"weight_shortcut": (4 * channels, in_channels, 1, 1, 1), "bias_shortcut": (4 * channels,)}
    return Case(
        "fast_bottleneck",
        lambda *tensors: ops.fast_bottleneck_reference(*tensors, *(() if projection else (None, None)), stride),
        tensors,
        {"stride": stride},
        dtypes=("bfloat16", "float16"),
    )


def _batch_norm(
    operator: str, reference: Callable, maps: tuple[str, ...], channels: int = 24, sums: bool = False, **options
) -> Case:
    """Of a pass over two groups of clips; ``reference`` takes the maps in their order, then the vectors."""
    groups = torch.linspace(-1, 1, 2 * channels).view(2, channels)
    vectors = {"mean": groups, "inverse_std": 1.5 + groups / 2, "weight": 1 + groups[0], "bias": groups[1]}
    if sums:
        vectors |= {"sum_grad": 45 * groups, "sum_grad_normalized": -45 * groups}
    return Case(operator, reference, dict.fromkeys(maps, (4, channels, 3, 5, 6)) | vectors, **options)


CASES = {
    "batch_norm_statistics": Case(
        "batch_norm_statistics",
        lambda x: batch_norm.batch_norm_statistics_reference(x, 2, 0.25),
        {"x": (4, 24, 3, 5, 6)},
        {"splits": 2, "eps": 0.25},
    ),
    "batch_norm_statistics_odd_channels": Case(
        "batch_norm_statistics", lambda x: batch_norm.batch_norm_statistics_reference(x, 1), {"x": (3, 5, 3, 5, 6)}
    ),
    "batch_norm_apply": _batch_norm(
        "batch_norm_apply",
        lambda x, residual, *vectors: batch_norm.batch_norm_apply_reference(x, *vectors, residual, True),
        ("x", "residual"),
    ),
    "batch_norm_apply_into_odd_channels": _batch_norm(
        "batch_norm_apply",
        lambda x, *vectors: batch_norm.batch_norm_apply_reference(x, *vectors, None, True),
        ("x",),
        13,
        out_channels=13,
    ),
    "batch_norm_reduce_gradient": _batch_norm(
        "batch_norm_reduce_gradient",
        lambda grad, x, y, *vectors: batch_norm.batch_norm_reduce_gradient_reference(grad, x, *vectors, y, True, True),
        ("grad", "x", "y"),
        keywords={"residual": True},
    ),
    "batch_norm_reduce_gradient_odd_channels": _batch_norm(
        "batch_norm_reduce_gradient",
        lambda grad, x, *vectors: batch_norm.batch_norm_reduce_gradient_reference(grad, x, *vectors, None, True, True),
        ("grad", "x"),
        13,
        keywords={"residual": True},
    ),
    "batch_norm_apply_gradient": _batch_norm(
        "batch_norm_apply_gradient",
        lambda grad, x, y, mean, inverse_std, weight, bias, *sums: batch_norm.batch_norm_apply_gradient_reference(
            grad, x, mean, inverse_std, weight, bias, y, True, *sums, 180
        ),
        ("grad", "x", "y"),
        sums=True,
        keywords={"count": 180},
    ),
    "batch_norm_apply_gradient_odd_channels": _batch_norm(
        "batch_norm_apply_gradient",
        lambda grad, x, *vectors: batch_norm.batch_norm_apply_gradient_reference(
            grad, x, *vectors, None, True, None, None, 0
        ),
        ("grad", "x"),
        13,
    ),
    "batch_norm_relu": Case(
        "batch_norm_relu",
        lambda x, weight, bias, residual: (F.batch_norm(x, None, None, weight, bias, True) + residual).relu(),
        {"x": (2, 24, 3, 5, 6), "weight": (24,), "bias": (24,), "residual": (2, 24, 3, 5, 6)},
    ),
    "conv3d_bn_relu": Case(
        "conv3d_bn_relu",
        lambda *tensors: ops.conv3d_bn_relu_reference(*tensors, (1, 2, 2), (1, 1, 1), True),
        {"x": (2, 24, 4, 9, 10), "weight": (40, 24, 3, 3, 3), "bias": (40,), "residual": (2, 40, 4, 5, 5)},
        {"stride": (1, 2, 2), "padding": 1},
    ),
    "conv3d_bn_relu_odd_channels": Case(
        "conv3d_bn_relu",
        lambda *tensors: ops.conv3d_bn_relu_reference(*tensors, None, (1, 1, 1), (0, 1, 1), True),
        {"x": (1, 5, 3, 7, 6), "weight": (7, 5, 1, 3, 3), "bias": (7,)},
        {"padding": (0, 1, 1)},
    ),
    "conv3d_bn_relu_into_channels": Case(
        "conv3d_bn_relu",
        lambda *tensors: ops.conv3d_bn_relu_reference(*tensors, None, (1, 1, 1), (0, 0, 0), True),
        {"x": (1, 64, 2, 7, 7), "weight": (72, 64, 1, 1, 1), "bias": (72,)},
        out_channels=72,
    ),
    "conv3d_bn_relu_pair": Case(
        "conv3d_bn_relu_pair",
        lambda *tensors: ops.conv3d_bn_relu_pair_reference(
            *tensors, (1, 1, 1), (1, 0, 0), (1, 2, 2), (0, 0, 0), True, False, False
        ),
        {
            "x": (2, 32, 3, 7, 6),
            "weight": (16, 32, 3, 1, 1),
            "bias": (16,),
            "weight_shortcut": (64, 32, 1, 1, 1),
            "bias_shortcut": (64,),
        },
        {"padding": (1, 0, 0), "stride_shortcut": (1, 2, 2)},
    ),
    "conv3d_statistics": Case(
        "conv3d_statistics",
        lambda *tensors: ops.conv3d_statistics_reference(*tensors, (1, 2, 2), (1, 1, 1), 0.25),
        {"x": (2, 24, 4, 9, 10), "weight": (40, 24, 3, 3, 3)},
        {"stride": (1, 2, 2), "padding": 1, "eps": 0.25},
        of_rounded=True,
    ),
    **{
        f"fast_bottleneck_{in_channels}_{channels}": _fast_bottleneck(in_channels, channels, stride)
        for in_channels, channels, stride in (
            (8, 8, 1),
            (32, 8, 1),
            (32, 16, 2),
            (64, 16, 1),
            (64, 32, 2),
            (128, 32, 1),
        )
    },
    "lateral_fuse": Case(
        "lateral_fuse",
        lambda *tensors: ops.lateral_fuse_reference(*tensors, 4, True),
        {"slow": (2, 32, 3, 5, 6), "fast": (2, 8, 9, 5, 6), "weight": (16, 8, 5, 1, 1), "bias": (16,)},
        {"stride": 4},
    ),
    "lateral_fuse_into": Case(
        "lateral_fuse_into",
        # The part behind one slow channel.
        lambda fast, weight, bias: ops.lateral_fuse_reference(fast[:, :1, ::4], fast, weight, bias, 4, True)[:, 1:],
        {"fast": (2, 8, 9, 5, 6), "weight": (16, 8, 5, 1, 1), "bias": (16,)},
        {"stride": 4},
        out_channels=16,
    ),
    "pool_head": Case(
        "pool_head",
        lambda *tensors: ops.pool_head_reference(*tensors, (), False, 0),
        {"slow": (2, 64, 2, 3, 4), "fast": (2, 8, 8, 3, 4), "weight": (21, 72), "bias": (21,)},
    ),
    "pool_head_windows_and_views": Case(
        "pool_head",
        lambda *tensors: ops.pool_head_reference(*tensors, (2, 3), True, 2),
        {"slow": (4, 64, 2, 3, 4), "fast": (4, 8, 8, 3, 4), "weight": (21, 72), "bias": (21,)},
        {"window": (2, 3), "softmax_positions": True, "views": 2},
    ),
    "stem_slow": Case(
        "stem",
        lambda *tensors: ops.stem_reference(*tensors, None, None, None),
        {"x": (1, 3, 3, 19, 17), "weight": (64, 3, 1, 7, 7), "bias": (64,)},
    ),
    "stem_fast": Case(
        "stem",
        lambda *tensors: ops.stem_reference(*tensors, None, None, None),
        {"x": (1, 3, 6, 19, 17), "weight": (8, 3, 5, 7, 7), "bias": (8,)},
    ),
    "stem_uint8": Case(
        "stem",
        ops.stem_reference,
        {
            "x": (torch.arange(5 * 19 * 17 * 3) * 37 % 256).to(torch.uint8).view(1, 5, 19, 17, 3),
            "weight": (64, 3, 1, 7, 7),
            "bias": (64,),
            "frames": torch.tensor([0, 2, 4]),
            "scale": torch.tensor([1 / 58.395, 1 / 57.12, 1 / 57.375]),
            "shift": torch.tensor([-123.675 / 58.395, -116.28 / 57.12, -103.53 / 57.375]),
        },
    ),
}


def make_tensors(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a case on the CPU, such that outputs are of unit size."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, given in case.tensors.items():
        if isinstance(given, Tensor):
            tensors[name] = given
            continue
        tensor = torch.randn(given, generator=generator)
        if len(given) == 1:
            tensors[name] = tensor
            continue
        if name.startswith("weight"):
            tensor *= prod(given[1:]) ** -0.5
        memory_format = torch.channels_last_3d if len(given) == 5 else torch.contiguous_format
        tensors[name] = tensor.to(dtype).contiguous(memory_format=memory_format)
    return tensors


def compare(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """The largest error of a call, and the largest that is allowed; both relative to the largest value."""
    tensors = make_tensors(case, dtype)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors.values()]
    expected = case.reference(*wide)
    arguments = {name: tensor.to(device) for name, tensor in tensors.items()} | case.keywords
    frame = None
    if case.out_channels:
        shape = list(expected.shape)
        shape[1] += 16
        frame = torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last_3d).to(device)
        arguments["out"] = frame[:, 8 : 8 + case.out_channels]
    actual = getattr(ops, case.operator)(**arguments)
    if frame is not None:  # the channels around must have stayed zero
        zeros = torch.zeros_like(expected[:, :8])
        actual, expected = frame, torch.cat([zeros, expected, zeros], 1)
    pairs = zip(*(result if isinstance(result, tuple) else (result,) for result in (actual, expected)), strict=True)
    errors, limits = zip(
        *((_error(one.cpu(), other), LIMITS[dtype if case.of_rounded else one.dtype]) for one, other in pairs),
        strict=True,
    )
    worst = max(range(len(errors)), key=lambda i: errors[i] / limits[i] if errors[i] == errors[i] else float("inf"))
    return errors[worst], limits[worst]


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        raise RuntimeError(f"the output must be {tuple(expected.shape)}, got {tuple(actual.shape)}")
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Small calls of every operator, compared with its reference.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"names or patterns (default: all), of: {list(CASES)}")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", default=",".join(DTYPES), help="one or more with commas between (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    with refusing(parser):
        options.device = check_device(options.device)
        reason = None if options.device.type == "cpu" else slowfast_ext.unavailable_reason(options.device)
        if reason is not None:  # the references would be compared with themselves
            raise RuntimeError(f"--device must be cpu or a GPU that the kernels run on, got {options.device}: {reason}")
        options.dtypes = list(dict.fromkeys(name.strip() for name in options.dtype.split(",")))
        for name in options.dtypes:
            if name not in DTYPES:
                raise ValueError(f"--dtype must be of {', '.join(DTYPES)}, got {name!r}")
        for pattern in options.cases:
            if not any(fnmatchcase(name, pattern) for name in CASES):
                raise ValueError(f"CASE must match one of {', '.join(CASES)}, got {pattern!r}")
    patterns = options.cases or ["*"]
    options.cases = [name for name in CASES if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    torch.backends.cudnn.allow_tf32 = False  # the operators follow it; the limit is that of float32
    rows = []
    for name in options.cases:
        for dtype in options.dtypes:
            if dtype not in CASES[name].dtypes:
                continue
            try:
                with torch.inference_mode():
                    error, limit = compare(CASES[name], DTYPES[dtype], options.device)
            except Exception as failure:  # whatever a kernel does; the other cases go on
                rows.append([name, dtype, "-", "-", f"failed: {first_lines(failure)}"])
                continue
            rows.append([name, dtype, f"{error:.1e}", f"{limit:.1e}", "correct" if error <= limit else "wrong"])
    print(format_table(["case", "type", "error", "limit", f"on {options.device}"], rows))
    return int(not rows or any(row[-1] != "correct" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
