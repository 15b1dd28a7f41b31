"""The operators. Each is one file: schema, docstring, reference, fake kernel, gradient and autocast rule."""

from .. import _library
from .conv3d_bn_relu import conv3d_bn_relu, conv3d_bn_relu_reference, fold_batch_norm

__all__ = ["conv3d_bn_relu", "conv3d_bn_relu_reference", "fold_batch_norm"]

_library.load_kernels()  # after the schemas that they implement
