"""What the fused twins have in common: they stand in for a plain block, over the same children."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .._library import unavailable_reason

# Block class -> the twin that replaces it; slowfast_ext.accelerate fills it in.
TWINS: dict[type[nn.Module], type[FusedBlock]] = {}

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_unavailable_reason = functools.cache(unavailable_reason)  # asked for each block in each forward


@torch.compiler.assume_constant_result
def backend_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the plain children serve tensors of this kind better, or None."""
    if device.type == "cuda" and dtype == torch.float64:
        return "the CUDA kernels do not compute in float64"
    return None if device.type == "cpu" else _unavailable_reason(device)


def call_reason(module: nn.Module) -> str | None:
    """Why calling ``module`` is more than running its class's forward, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks, which a fused block cannot run"
    if "forward" in module.__dict__:
        return "has had its forward replaced"
    return None


def recording_reason(*tensors: Tensor | None) -> str | None:
    """Why gradients of these parameters keep a block from being fused, or None."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "gradients of its parameters are recorded (torch.inference_mode() turns that off)"
    return None


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype a convolution with this weight computes in: autocast's where it is on."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


class FusedBlock(nn.Module, ABC):
    """Base of the twins: a module over the children, parameters, buffers and hooks of the plain block it replaces.

    Twin and plain block share these registries themselves: state-dict keys are the same, and a hook or child given to
    one is the other's too. A forward in evaluation mode is fused. In training mode, and where gradients of parameters
    are recorded, it is that of training if ``trains`` is set and the class has one, else the plain block's own (so
    gradients are the plain block's, for Grad-CAM as for fine-tuning with frozen batch norm); and it is the plain
    block's for whatever :meth:`reason_against` finds, which is asked in each forward. Fused results are in
    channels_last_3d. Global module hooks see the twin as one module.

    Args:
        plain: an instance of a block class that this twin is registered for.

    Raises:
        ValueError: there is a reason against it.
    """

    nested = False  # whether it calls blocks that have twins themselves
    takes_out = False  # whether fused_forward does; such a twin has out_channels
    takes_lateral = False  # whether training_forward does
    # Attributes that are the twin's and not the plain block's.
    own: tuple[str, ...] = ("plain", "last_forward", "layer_by_layer", "trains")

    def __init__(self, plain: nn.Module):
        reason = self.reason_against(plain)
        if reason is not None:
            raise ValueError(
                f"{type(self).__name__}: plain must be a block that can be replaced, got one where {reason}"
            )
        super().__init__()
        self.__dict__.update(plain.__dict__)
        object.__setattr__(self, "plain", plain)  # around registration: its children are this module's
        self.last_forward: str | None = None  # "fused", or why not
        self.trains = False  # whether accelerate() was asked for training
        self.layer_by_layer: str | None = None  # why the last fused forward was not one operator for all, if so

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Why this twin cannot replace ``module``, or None. Looks at everything but the input."""
        if TWINS.get(type(module)) is not cls:
            return f"{cls.__name__} does not know the class {type(module).__name__}"
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return "its forward has been replaced or compiled"
        return cls._children_reason(module)

    @classmethod
    @abstractmethod
    def _children_reason(cls, module: nn.Module) -> str | None:
        """Why the children of ``module`` cannot be fused, or None."""

    @abstractmethod
    def _state_reason(self) -> str | None:
        """Why the modes of the children, or of torch, rule a fused forward out for now, or None."""

    def _training_reason(self) -> str | None:
        """Why the plain block's forward serves training better, or None: then there is a ``training_forward``."""
        return f"{type(self).__name__} has no forward pass for training"

    def _reason_now(self) -> str | None:
        """Why this forward has to be the plain block's, or None."""
        if self.training:
            return "it is in training mode"
        return self._children_reason(self) or self._state_reason()

    def forward(self, *args, out: Tensor | None = None, **kwargs) -> Tensor:
        """As the plain block's.

        ``out`` is an offer by the twin around this one: a place for a fused result, in a wider tensor. Whoever made it
        looks whether the result is that very tensor; a plain forward or a hook may give another one.
        """
        reason = self._reason_now()
        trains = reason is not None and self.trains
        if trains:
            reason = self._training_reason()
        if not torch.compiler.is_compiling():
            self.last_forward = reason or "fused"
        if reason is not None:
            return self._plain_forward(*args, **kwargs)
        if trains:
            return self.training_forward(*args, **kwargs)
        return self.fused_forward(*args, **kwargs) if out is None else self.fused_forward(*args, out=out, **kwargs)

    def trains_now(self) -> bool:
        """Whether a forward pass would be that of training, and calling the module is nothing more."""
        if not self.trains or call_reason(self) is not None:
            return False
        return self._reason_now() is not None and self._training_reason() is None

    def _plain_forward(self, *args, **kwargs) -> Tensor:
        return type(self.plain).forward(self, *args, **kwargs)

    def _note_layer_by_layer(self, reason: str | None) -> None:
        if not torch.compiler.is_compiling():
            self.layer_by_layer = reason

    def restored(self) -> nn.Module:
        """The plain block itself, in the state that this module is in."""
        self.plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in self.own})
        return self.plain

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "plain" not in self.__dict__:  # while being copied
                raise
            return getattr(self.plain, name)  # properties and methods of the block's class

    def extra_repr(self) -> str:
        return self.plain.extra_repr()
