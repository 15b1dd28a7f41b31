"""The operators. Each is one file: schema, docstring, reference, fake kernel, gradient and autocast rule."""

from .. import _library
from .batch_norm import (
    batch_norm_apply,
    batch_norm_apply_gradient,
    batch_norm_reduce_gradient,
    batch_norm_statistics,
)
from .batch_norm_relu import batch_norm_relu
from .conv3d_bn_relu import conv3d_bn_relu, conv3d_bn_relu_reference, fold_batch_norm
from .conv3d_bn_relu_pair import conv3d_bn_relu_pair, conv3d_bn_relu_pair_reference
from .conv3d_statistics import (
    conv3d_statistics,
    conv3d_statistics_reason_against,
    conv3d_statistics_reference,
)
from .fast_bottleneck import fast_bottleneck, fast_bottleneck_reason_against, fast_bottleneck_reference
from .lateral_fuse import lateral_fuse, lateral_fuse_into, lateral_fuse_reference
from .pool_head import pool_head, pool_head_reference
from .stem import stem, stem_reason_against, stem_reference

__all__ = [
    "batch_norm_apply",
    "batch_norm_apply_gradient",
    "batch_norm_reduce_gradient",
    "batch_norm_relu",
    "batch_norm_statistics",
    "conv3d_bn_relu",
    "conv3d_bn_relu_pair",
    "conv3d_bn_relu_pair_reference",
    "conv3d_bn_relu_reference",
    "conv3d_statistics",
    "conv3d_statistics_reason_against",
    "conv3d_statistics_reference",
    "fast_bottleneck",
    "fast_bottleneck_reason_against",
    "fast_bottleneck_reference",
    "fold_batch_norm",
    "lateral_fuse",
    "lateral_fuse_into",
    "lateral_fuse_reference",
    "pool_head",
    "pool_head_reference",
    "stem",
    "stem_reason_against",
    "stem_reference",
]

_library.load_kernels()  # after the schemas that they implement
