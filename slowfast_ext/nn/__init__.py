"""Fused twins of network blocks: modules that contain the children they replace and compute with `slowfast_ext.ops`."""

from .block import FusedBlock
from .conv import FusedConvBNReLU3d
from .lateral import FusedLateral
from .residual import FusedBasicBlock3d, FusedBottleneck3d

__all__ = ["FusedBasicBlock3d", "FusedBlock", "FusedBottleneck3d", "FusedConvBNReLU3d", "FusedLateral"]
