"""The networks are the published ones: parameters, state-dict entries, operations and shapes, on the meta device."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn

from slowfast_ext.models import (
    BasicBlock3d,
    Bottleneck3d,
    ConvBNReLU3d,
    Lateral,
    SlowFastHead,
    Stem,
    build_model,
    fast_pathway,
    get_config,
    list_models,
    slow_pathway,
)

R50_4X16 = "slowfast_r50_4x16x1_256e_kinetics400_rgb"
R50_8X8 = "slowfast_r50_8x8x1_256e_kinetics400_rgb"
R50_8X8_NORM = "slowfast_r50_8x8x1_256e_kinetics400_rgb_steplr"
R101_8X8 = "slowfast_r101_8x8x1_256e_kinetics400_rgb"
R50_16X8 = "slowfast_r50_16x8x1_22e_sthv1_rgb"

ZOO_COUNTS = {  # name: parameters, state-dict entries
    R50_4X16: (34_479_288, 642),
    "slowfast_r50_video_4x16x1_256e_kinetics400_rgb": (34_479_288, 642),
    "slowfast_prebn_r50_4x16x1_256e_kinetics400_rgb": (34_479_288, 642),
    R50_8X8: (34_565_560, 642),
    R50_8X8_NORM: (34_566_488, 662),
    "slowfast_multigrid_r50_8x8x1_358e_kinetics400_rgb": (34_566_488, 662),
    "slowfast_prebn_r50_8x8x1_256e_kinetics400_rgb_steplr": (34_566_488, 662),
    "slowfast_r101_r50_4x16x1_256e_kinetics400_rgb": (62_384_312, 948),
    R101_8X8: (62_912_312, 1254),
    "slowfast_r152_r50_4x16x1_256e_kinetics400_rgb": (84_843_704, 1254),
    R50_16X8: (34_044_630, 642),
}


def on_meta(config):
    with torch.device("meta"):
        return build_model(config).eval()


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_zoo_model_has_published_counts():
    assert list_models() == list(ZOO_COUNTS)


@pytest.mark.parametrize("name", ZOO_COUNTS)
def test_parameters_and_entries_are_the_published_ones(name):
    model = on_meta(name)
    assert (parameters(model), len(model.state_dict())) == ZOO_COUNTS[name]


def test_parameters_of_the_fair_networks():
    norm_4x16 = dataclasses.replace(get_config(R50_4X16), lateral_norm=True)
    r101 = dataclasses.replace(get_config(R101_8X8), lateral_norm=True, fusion_kernel=5)
    partial = [(1, 1, (3,) * 6 + (1,) * 17, 3), (3, 3, (3,) * 6 + (1,) * 17, 3)]
    slow, fast = (
        dataclasses.replace(pathway(101), temporal_kernels=kernels)
        for pathway, kernels in zip((slow_pathway, fast_pathway), partial, strict=True)
    )
    assert parameters(on_meta(norm_4x16)) == 34_480_216
    assert parameters(on_meta(r101)) == 62_826_968
    assert parameters(on_meta(dataclasses.replace(r101, slow=slow, fast=fast))) == 53_774_808


@pytest.mark.parametrize(("name", "laterals"), [(R50_4X16, 215_680), (R50_8X8, 301_952)])
def test_parameters_of_the_parts(name, laterals):
    model = on_meta(name)
    assert parameters(model.backbone.fast_path) == 514_152
    assert parameters(model.head) == 922_000
    assert sum(map(parameters, model.backbone.slow_path.laterals)) == laterals


class Operations:
    """Multiply-accumulates of convolutions by group, and everything that mmcv's counter counts, of one clip."""

    def __init__(self, model, frames, side=256):
        self.convolutions, self.others = Counter(), 0
        for name, module in model.named_modules():
            module.register_forward_hook(self._hook(name))
        model(torch.empty(1, 3, frames, side, side, device="meta"))

    def _hook(self, name):
        def count(module, inputs, output):
            if isinstance(module, nn.Conv3d):
                self.convolutions[self._group(name, module)] += output.numel() * module.weight[0].numel()
            elif isinstance(module, nn.BatchNorm3d):
                self.others += 2 * output.numel()
            elif isinstance(module, nn.MaxPool3d):
                self.others += 2 * inputs[0].numel()  # and the stem's activation before it
            elif isinstance(module, BasicBlock3d | Bottleneck3d):
                self.others += output.numel()  # the activation after the sum
            elif isinstance(module, ConvBNReLU3d | Lateral) and not isinstance(module, Stem) and module.relu:
                self.others += output.numel() if isinstance(module, ConvBNReLU3d) else output.numel() // 5
            elif isinstance(module, SlowFastHead):
                self.others += sum(feature.numel() for feature in inputs[0])  # pooling
            elif isinstance(module, nn.Linear):
                self.others += module.weight.numel()

        return count

    @staticmethod
    def _group(name, conv):
        if "lateral" in name:
            return "laterals"
        pathway = "slow" if "slow_path" in name else "fast"
        return pathway + (" stem" if conv.in_channels == 3 else " {}x{}x{}".format(*conv.kernel_size))

    @property
    def total(self):
        return self.convolutions.total() + self.others


@pytest.mark.parametrize(
    ("name", "expected", "total"),
    [
        (R50_4X16, (9.66, 9.66, 8.74, 3.08, 0.62, 1.84, 1.21, 0.77, 0.51), 36.10),
        (R50_8X8, (19.33, 19.33, 17.48, 3.08, 1.23, 1.84, 1.21, 0.77, 1.44), 65.71),
    ],
)
def test_convolution_operations_by_group(name, expected, total):
    counted = Operations(on_meta(name), frames=32).convolutions
    groups = ("slow 1x3x3", "slow 3x1x1", "slow 1x1x1", "fast stem", "slow stem")
    groups += ("fast 3x1x1", "fast 1x3x3", "fast 1x1x1", "laterals")
    assert set(counted) == set(groups)
    assert tuple(round(counted[group] / 1e9, 2) for group in groups) == expected
    assert round(counted.total() / 1e9, 2) == total


@pytest.mark.parametrize(
    ("name", "frames", "published"),
    [
        (R50_4X16, 32, 36_441_296_896),
        (R50_8X8, 32, 66_222_034_944),
        (R101_8X8, 32, 127_070_375_936),
        ("slowfast_r101_r50_4x16x1_256e_kinetics400_rgb", 32, 65_042_780_160),
        ("slowfast_r152_r50_4x16x1_256e_kinetics400_rgb", 32, 91_515_654_144),
        (R50_16X8, 64, 132_442_627_584),
    ],
)
def test_all_operations_are_the_published_ones_to_the_unit(name, frames, published):
    assert Operations(on_meta(name), frames).total == published


def test_operations_at_the_training_crop_are_the_published_ones():
    assert Operations(on_meta(R50_4X16), 32, side=224).total == 27_900_583_936
    assert Operations(on_meta(R50_8X8_NORM), 32, side=224).total == 50_711_095_296


@pytest.mark.parametrize(("name", "slow_frames"), [(R50_4X16, 4), (R50_8X8, 8)])
def test_shapes_along_the_network(name, slow_frames):
    model = on_meta(name)
    shapes = {}

    def note(module_name):
        return lambda module, inputs, output: shapes.update({module_name: tuple(output.shape[1:])})

    for module_name, module in model.backbone.named_modules():
        module.register_forward_hook(note(module_name)) if module_name else None
    slow, fast = model.backbone(torch.empty(1, 3, 32, 256, 256, device="meta"))
    assert (slow.shape[1:], fast.shape[1:]) == ((2048, slow_frames, 8, 8), (256, 32, 8, 8))
    for path, frames, width in (("slow_path", slow_frames, 64), ("fast_path", 32, 8)):
        assert shapes[f"{path}.conv1.conv"] == (width, frames, 128, 128)
        assert shapes[f"{path}.conv1"] == (width, frames, 64, 64)
        for stage, side in enumerate((64, 32, 16, 8)):
            assert shapes[f"{path}.layer{stage + 1}"] == (width * 4 * 2**stage, frames, side, side)
    fused = [shapes[f"slow_path.{lateral}_lateral"] for lateral in ("conv1", "layer1", "layer2", "layer3")]
    sizes = zip((80, 320, 640, 1280), (64, 64, 32, 16), strict=True)
    assert fused == [(channels, slow_frames, side, side) for channels, side in sizes]


@pytest.mark.parametrize(("side", "last"), [(224, 7), (158, 5), (112, 4)])
def test_last_map_at_other_crops(side, last):
    slow, _ = on_meta(R50_16X8).backbone(torch.empty(1, 3, 64, side, side, device="meta"))
    assert slow.shape == (1, 2048, 16, last, last)
