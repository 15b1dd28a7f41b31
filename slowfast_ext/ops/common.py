"""What the operators share: the wording of errors, the dtype of sums, the autocast rule."""

import torch
from torch import Tensor

from .._library import lib


def check(operator: str, condition: bool, argument: str, expected: object, actual: object) -> None:
    """Raise RuntimeError unless ``condition``; usable in fake kernels and under torch.compile."""
    if not isinstance(condition, bool):  # of symbolic sizes
        torch._check(condition, lambda: f"{operator}: {argument} must be {expected}, got {actual}")
    elif not condition:
        raise RuntimeError(f"{operator}: {argument} must be {expected}, got {actual}")


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """What sums over ``x`` are kept in, and biases are given in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.compiler.assume_constant_result
def _convolutions_use_tf32() -> bool:
    # Not cudnn.allow_tf32, which raises once a program has used the newer switch, and which sets this one too.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def allows_tf32(x: Tensor) -> bool:
    """Whether torch lets a convolution of ``x`` round its factors to TF32."""
    return x.dtype == torch.float32 and x.is_cuda and _convolutions_use_tf32()


def has_pixels(tensor: Tensor) -> bool:
    """Channels side by side and pixels at one distance: channels_last_3d, or some channels of such a tensor."""
    sizes, strides = tensor.shape, tensor.stride()
    distance, pixels = None, 1
    for dimension in (4, 3, 2, 0):
        if sizes[dimension] != 1:
            distance = strides[dimension] // pixels if distance is None else distance
            if strides[dimension] != distance * pixels:
                return False
            pixels = pixels * sizes[dimension]
    return (sizes[1] == 1 or strides[1] == 1) and (distance is None or distance >= sizes[1])


def check_out(
    operator: str, x: Tensor, out: Tensor, shape: list[int], *, name: str = "x", out_name: str = "out"
) -> None:
    """``out`` can be written: shape, layout, and device and dtype, which are those of ``x``, called ``name``."""
    check(operator, out.device == x.device, out_name, f"on the device of {name}, {x.device}", out.device)
    check(operator, out.dtype == x.dtype, out_name, f"in the dtype of {name}, {x.dtype}", out.dtype)
    check(operator, tuple(out.shape) == tuple(shape), out_name, tuple(shape), tuple(out.shape))
    layout = "channels_last_3d or a slice of the channels of such a tensor"
    check(operator, has_pixels(out), out_name, layout, f"strides {tuple(out.stride())}")


def refuse_gradients_with_out(operator: str, *tensors: Tensor | None) -> None:
    """An operator that writes into ``out`` has no gradient; say so instead of returning wrong ones."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{operator}: with out, no argument may require gradients (or use torch.no_grad())")


def register_autocast(operator: torch._ops.OpOverload, cast: tuple[str, ...], keep: tuple[str, ...] = ()) -> None:
    """Under autocast, cast the arguments named in ``cast``, the other floating-point ones to float32; never float64.

    Those named in ``keep`` stay as they are. torch.library.register_autocast would cast all, biases too. With an
    argument ``out`` its dtype takes the place of autocast's: the buffer is there already.
    """
    names = [argument.name for argument in operator._schema.arguments]

    def convert(argument, dtype):
        castable = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
        return argument.to(dtype) if castable else argument

    def register(device_type, key):
        exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*arguments):
            given = dict(zip(names, arguments, strict=True))
            dtype = given["out"].dtype if "out" in given else torch.get_autocast_dtype(device_type)
            dtypes = {name: dtype if name in (*cast, "out") else torch.float32 for name in names if name not in keep}
            with torch._C._ExcludeDispatchKeyGuard(exclude):
                return operator(
                    *(convert(given[name], dtypes[name]) if name in dtypes else given[name] for name in names)
                )

        lib.impl(operator, kernel, key)

    register("cuda", "AutocastCUDA")
    register("cpu", "AutocastCPU")
