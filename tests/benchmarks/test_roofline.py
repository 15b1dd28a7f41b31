"""The work of each layer, against an independent count for 30 views of 32x256x256 in bfloat16."""

import functools

import pytest
import torch
from roofline import Kernel, count_layers, floor_milliseconds

import slowfast_ext
from slowfast_ext.engine import Ceilings

R50_4X16 = "slowfast_r50_4x16x1_256e_kinetics400_rgb"
R50_8X8 = "slowfast_r50_8x8x1_256e_kinetics400_rgb"
H200 = Ceilings(operations=788e12, bandwidth=4.3e12)


@functools.cache
def layers_of(name, dtype=torch.bfloat16):
    with torch.device("meta"):
        return count_layers(slowfast_ext.create_model(name).eval(), torch.empty(30, 3, 32, 256, 256, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "gmac_a_view", "gigabytes", "floor_ms"), [(R50_4X16, 36.10, 18.09, 5.412), (R50_8X8, 65.71, 27.11, 8.652)]
)
def test_totals_agree_with_the_analytic_ones(name, gmac_a_view, gigabytes, floor_ms):
    layers = layers_of(name)
    assert len(layers) == 110 + 2 + 1  # convolutions, pools, head
    assert sum(layer.macs for layer in layers) / 30e9 == pytest.approx(gmac_a_view, abs=5e-3)
    assert sum(layer.bytes for layer in layers) / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert floor_milliseconds(H200, layers) == pytest.approx(floor_ms, rel=0.01)


@pytest.mark.parametrize(
    ("layer", "gmac", "megabytes"),
    [
        ("slow_path.conv1.conv", 18.50, 298.9),
        ("fast_path.conv1.conv", 92.48, 629.2),
        ("slow_path.conv1_lateral.conv", 0.31, 55.1),  # temporal kernel 5, stride 8: five frames of eight are read
        ("slow_path.layer1.0.conv1.conv", 2.52, 141.6),
        ("slow_path.layer1.0.conv3.conv", 8.05, 566.3),  # reads the shortcut as well
        ("fast_path.layer1.2.conv3.conv", 1.01, 566.2),
        ("slow_path.layer2.0.downsample.conv", 20.13, 204.8),  # 1x1x1 with spatial stride 2: a quarter is read
        ("slow_path.layer4.0.conv1.conv", 60.40, 114.0),  # weights are 3 % of it
    ],
)
def test_a_layer_moves_each_tensor_once(layer, gmac, megabytes):
    (counted,) = (entry for entry in layers_of(R50_4X16) if entry.name == f"backbone.{layer}")
    assert counted.macs / 1e9 == pytest.approx(gmac, abs=5e-3)
    assert counted.bytes / 1e6 == pytest.approx(megabytes, abs=0.06)


def test_float32_moves_twice_the_bytes_of_bfloat16():
    single, half = layers_of(R50_4X16, torch.float32), layers_of(R50_4X16)
    assert [layer.bytes for layer in single] == [2 * layer.bytes for layer in half]
    assert [layer.macs for layer in single] == [layer.macs for layer in half]


def test_counting_leaves_no_hook_behind():
    with torch.device("meta"):
        model = slowfast_ext.create_model(R50_4X16).eval()
        count_layers(model, torch.empty(1, 3, 8, 32, 32))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_floor_of_a_layer_is_the_longer_of_its_two_times():
    ceilings = Ceilings(operations=2e3, bandwidth=1e3)
    assert floor_milliseconds(ceilings, [Kernel("bound by operations", macs=3, bytes=1)]) == pytest.approx(3)
    assert floor_milliseconds(ceilings, [Kernel("bound by memory", macs=1, bytes=5)]) == pytest.approx(5)
