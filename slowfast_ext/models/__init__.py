"""SlowFast in plain PyTorch: the networks every fused path is compared with."""

from .batch_norm import SubBatchNorm3d, SyncBatchNorm3d
from .config import IMAGENET, UNIFORM, Normalization, PathwayConfig, SlowFastConfig, fast_pathway, slow_pathway
from .head import SlowFastHead
from .inflate import InflationReport, inflate_from_2d
from .recognizer import SlowFastRecognizer
from .resnet3d import BasicBlock3d, Bottleneck3d, ConvBNReLU3d, Lateral, ResNet3dPathway, Stem
from .slowfast import SlowFastBackbone
from .zoo import ZOO, ZooRow, build_model, get_config, list_models

__all__ = [
    "IMAGENET",
    "UNIFORM",
    "ZOO",
    "BasicBlock3d",
    "Bottleneck3d",
    "ConvBNReLU3d",
    "InflationReport",
    "Lateral",
    "Normalization",
    "PathwayConfig",
    "ResNet3dPathway",
    "SlowFastBackbone",
    "SlowFastConfig",
    "SlowFastHead",
    "SlowFastRecognizer",
    "Stem",
    "SubBatchNorm3d",
    "SyncBatchNorm3d",
    "ZooRow",
    "build_model",
    "fast_pathway",
    "get_config",
    "inflate_from_2d",
    "list_models",
    "slow_pathway",
]
