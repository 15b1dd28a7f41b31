from pathlib import Path

import pytest
import torch
from peer_networks import caffe2_name, pyslowfast_name, pytorchvideo_name

from slowfast_ext.checkpoints.keys import recognise, strip_wrappers, to_mmaction2
from slowfast_ext.models import build_model

# One row an entry of R50 8x8 with lateral norm: its name in mmaction2, PySlowFast and pytorchvideo, and its shape.
ROWS = [
    line.split("\t") for line in (Path(__file__).parent / "keymap_r50_8x8_lateralnorm.tsv").read_text().splitlines()[1:]
]
COLUMNS = {"mmaction2": 0, "pyslowfast": 1, "pytorchvideo": 2}


def test_the_table_is_the_whole_network_in_order():
    with torch.device("meta"):
        state = build_model("slowfast_r50_8x8x1_256e_kinetics400_rgb_steplr").state_dict()
    shapes = ["x".join(map(str, value.shape)) or "scalar" for value in state.values()]
    assert [(row[0], row[3]) for row in ROWS] == list(zip(state, shapes, strict=True))


@pytest.mark.parametrize("source", COLUMNS)
def test_names_translate_to_mmaction2s_one_to_one(source):
    names = [row[COLUMNS[source]] for row in ROWS]
    assert len(set(names)) == len(names) == 662
    assert [to_mmaction2(name, source) for name in names] == [row[0] for row in ROWS]
    assert recognise(names) == source


def test_the_writers_of_the_tests_use_the_published_names():
    assert [pyslowfast_name(row[0]) for row in ROWS] == [row[1] for row in ROWS]
    assert [pytorchvideo_name(row[0]) for row in ROWS] == [row[2] for row in ROWS]


def test_names_of_caffe2_translate_one_to_one():
    expected = [row[0] for row in ROWS if not row[0].endswith("num_batches_tracked")]
    names = [caffe2_name(key) for key in expected]
    assert len(set(names)) == len(names) == 552
    assert [to_mmaction2(name, "caffe2") for name in names] == expected
    assert recognise(names) == "caffe2"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv1_w", "backbone.slow_path.conv1.conv.weight"),
        ("t_conv1_w", "backbone.fast_path.conv1.conv.weight"),
        ("res_conv1_bn_riv", "backbone.slow_path.conv1.bn.running_var"),
        ("t_res_conv1_bn_s", "backbone.fast_path.conv1.bn.weight"),
        ("res2_0_branch1_w", "backbone.slow_path.layer1.0.downsample.conv.weight"),
        ("res4_22_branch2b_bn_rm", "backbone.slow_path.layer3.22.conv2.bn.running_mean"),
        ("t_res5_2_branch2c_bn_b", "backbone.fast_path.layer4.2.conv3.bn.bias"),
        ("t_pool1_subsample_w", "backbone.slow_path.conv1_lateral.conv.weight"),
        ("t_pool1_subsample_bn_s", "backbone.slow_path.conv1_lateral.bn.weight"),
        ("t_res4_22_branch2c_bn_subsample_w", "backbone.slow_path.layer3_lateral.conv.weight"),
        ("t_res3_3_branch2c_bn_subsample_bn_riv", "backbone.slow_path.layer2_lateral.bn.running_var"),
        ("pred_w", "cls_head.fc_cls.weight"),
        ("pred_b", "cls_head.fc_cls.bias"),
    ],
)
def test_names_of_caffe2(name, expected):
    assert to_mmaction2(name, "caffe2") == expected


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lr", "caffe2"),
        ("conv1_w_momentum", "caffe2"),
        ("s2.pathway0_nonlocal1.conv_theta.weight", "pyslowfast"),
        ("s6.pathway0_res0.branch1.weight", "pyslowfast"),
        ("blocks.5.pool.weight", "pytorchvideo"),
        ("detection_head.proj.weight", "pytorchvideo"),
        ("conv1.weight", "mmaction2"),
    ],
)
def test_names_without_a_place_have_none(name, source):
    assert to_mmaction2(name, source) is None


def test_wrappers_are_stripped_and_other_networks_not_recognised():
    assert strip_wrappers("module.model.blocks.6.proj.bias") == "blocks.6.proj.bias"
    assert strip_wrappers("modules.weight") == "modules.weight"
    assert recognise(["conv1.weight", "layer1.0.conv1.weight"]) is None
