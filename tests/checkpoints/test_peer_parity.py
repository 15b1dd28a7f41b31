"""An imported network computes what the code base that it comes from computes."""

import dataclasses

import pytest
import torch
from peer_networks import (
    caffe2_name,
    fair_forward,
    peer_weights,
    pyslowfast_cfg,
    pyslowfast_name,
    pytorchvideo_name,
    save_caffe2,
)
from small_networks import lively_model, small_config

import slowfast_ext
from slowfast_ext.checkpoints import convert
from slowfast_ext.models import UNIFORM


@pytest.fixture(scope="module")
def network():
    """R50 8x8 with lateral norm."""
    return lively_model(small_config(lateral_norm=True))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [64, 96])
def test_pyslowfast_probabilities(network, tmp_path, side):
    weights = peer_weights(network, pyslowfast_name)
    cfg = pyslowfast_cfg(frames=16, crop=64)
    torch.save({"epoch": 196, "model_state": weights, "optimizer_state": {}, "cfg": cfg}, tmp_path / "epoch.pyth")
    model = slowfast_ext.load_checkpoint(tmp_path / "epoch.pyth").eval()
    clip = torch.randn(2, 3, 16, side, side)
    with torch.inference_mode():
        expected = fair_forward(weights, clip, alpha=4, window=2, softmax=True)
        close(model(clip).softmax(1), expected)


def test_caffe2_probabilities(network, tmp_path):
    save_caffe2(peer_weights(network, caffe2_name), tmp_path / "SLOWFAST_8x8_R50.pkl")
    model = slowfast_ext.load_checkpoint(tmp_path / "SLOWFAST_8x8_R50.pkl").eval()
    clip = torch.randn(1, 3, 8, 224, 256)
    with torch.inference_mode():
        expected = fair_forward(peer_weights(network, pyslowfast_name), clip, alpha=4, window=7, softmax=True)
        close(model(clip).softmax(1), expected)


def test_pytorchvideo_logits(network, tmp_path):
    weights = {f"module.model.{name}": value for name, value in peer_weights(network, pytorchvideo_name).items()}
    torch.save({"model_state": weights}, tmp_path / "SLOWFAST_8x8_R50.pyth")
    model = slowfast_ext.load_checkpoint(tmp_path / "SLOWFAST_8x8_R50.pyth").eval()
    clip = torch.randn(1, 3, 8, 224, 256)
    with torch.inference_mode():
        expected = fair_forward(peer_weights(network, pyslowfast_name), clip, alpha=4, window=7, softmax=False)
        close(model(clip), expected)


def test_mmaction2_logits(network, tmp_path):
    torch.save({"meta": {"mmcv_version": "1.7.1"}, "state_dict": network.state_dict()}, tmp_path / "epoch_256.pth")
    model = slowfast_ext.load_checkpoint(tmp_path / "epoch_256.pth").eval()
    assert model.config == network.config
    clip = torch.randn(2, 3, 16, 32, 32)
    with torch.inference_mode():
        assert model(clip).equal(network(clip))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_converted_network_is_the_same_network(network, tmp_path, suffix):
    weights = peer_weights(network, pyslowfast_name)
    cfg = pyslowfast_cfg(frames=16, crop=64)
    torch.save({"model_state": weights, "cfg": cfg}, tmp_path / "epoch.pyth")
    report = convert(tmp_path / "epoch.pyth", tmp_path / f"converted{suffix}")
    assert report.source_format == "PySlowFast"
    original = slowfast_ext.load_checkpoint(tmp_path / "epoch.pyth").eval()
    converted = slowfast_ext.load_checkpoint(tmp_path / f"converted{suffix}").eval()
    assert converted.load_report.source_format == "slowfast_ext"
    assert converted.config == original.config
    assert converted.config.frame_sampling == "linspace"
    assert converted.config.normalization == UNIFORM
    assert (converted.config.head_pooling, converted.config.head_window) == ("sliding_softmax", (2, 2))
    clip = torch.randn(1, 3, 16, 96, 96)
    with torch.inference_mode():
        assert converted(clip).equal(original(clip))


def test_temporal_kernels_of_each_block_come_from_the_shapes(tmp_path):
    config = small_config(lateral_norm=True, fusion_kernel=5)
    slow = dataclasses.replace(config.slow, temporal_kernels=(1, 1, (3, 3, 1, 1, 1, 1), (3, 1, 3)))
    fast = dataclasses.replace(config.fast, temporal_kernels=(3, 3, (3, 3, 1, 1, 1, 1), 3))
    weights = peer_weights(lively_model(dataclasses.replace(config, slow=slow, fast=fast)), pyslowfast_name)
    torch.save({"model_state": weights, "cfg": pyslowfast_cfg(crop=32)}, tmp_path / "epoch.pyth")
    model = slowfast_ext.load_checkpoint(tmp_path / "epoch.pyth").eval()
    assert (model.config.slow, model.config.fast) == (slow, fast)
    clip = torch.randn(1, 3, 8, 32, 32)
    with torch.inference_mode():
        close(model(clip).softmax(1), fair_forward(weights, clip, alpha=4, window=1, softmax=True))
