"""Fused twins of network blocks: modules that contain the children they replace and compute with `slowfast_ext.ops`."""

from .backbone import FusedSlowFastBackbone
from .block import FusedBlock
from .conv import FusedConvBNReLU3d
from .head import FusedHead
from .lateral import FusedLateral
from .residual import FusedBasicBlock3d, FusedBottleneck3d
from .stem import FusedStem
from .traced import FusedSequential, FusedTraced

__all__ = [
    "FusedBasicBlock3d",
    "FusedBlock",
    "FusedBottleneck3d",
    "FusedConvBNReLU3d",
    "FusedHead",
    "FusedLateral",
    "FusedSequential",
    "FusedSlowFastBackbone",
    "FusedStem",
    "FusedTraced",
]
