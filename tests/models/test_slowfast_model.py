import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from small_networks import lively_model, small_config
from torch import nn

from slowfast_ext.models import (
    IMAGENET,
    UNIFORM,
    PathwayConfig,
    SlowFastBackbone,
    SlowFastConfig,
    build_model,
    slow_pathway,
)


@pytest.mark.parametrize(
    ("sampling", "rate", "frames", "expected"),
    [
        ("strided", 4, 32, [0, 4, 8, 12, 16, 20, 24, 28]),
        ("strided", 8, 32, [0, 8, 16, 24]),
        ("strided", 8, 8, [0]),
        ("linspace", 4, 32, [0, 4, 8, 13, 17, 22, 26, 31]),
        ("linspace", 8, 32, [0, 10, 20, 31]),
        ("linspace", 4, 64, [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]),
        ("linspace", 8, 8, [0]),
    ],
)
def test_slow_pathway_sees_the_published_frames(sampling, rate, frames, expected):
    config = small_config(resample_rate=rate, speed_ratio=rate, frame_sampling=sampling)
    assert config.slow_frames(frames) == expected
    clip = torch.arange(frames, dtype=torch.float32).reshape(1, 1, frames, 1, 1)
    slow, fast = SlowFastBackbone(config).split(clip)
    assert slow.flatten().tolist() == expected
    assert fast.equal(clip)


def test_fast_pathway_is_thinned_where_tau_is_a_multiple_of_alpha():
    config = small_config(resample_rate=8, speed_ratio=4)
    clip = torch.arange(16.0).reshape(1, 1, 16, 1, 1)
    slow, fast = SlowFastBackbone(config).split(clip)
    assert slow.flatten().tolist() == [0, 8]
    assert fast.flatten().tolist() == list(range(0, 16, 2))


@pytest.mark.parametrize(("slow_depth", "fast_depth"), [(18, 18), (34, 18), (50, 18), (18, 50), (101, 50), (152, 34)])
def test_any_two_depths_go_together(slow_depth, fast_depth):
    with torch.device("meta"):
        model = build_model(small_config(slow_depth, fast_depth)).eval()
        slow, fast = model.backbone(torch.empty(1, 3, 8, 32, 32))
        assert model.head((slow, fast)).shape == (1, 5)
    assert slow.shape == (1, 64 if slow_depth < 50 else 256, 2, 1, 1)
    assert fast.shape == (1, 16 if fast_depth < 50 else 64, 8, 1, 1)


def test_temporal_kernels_are_those_of_the_configuration():
    slow = PathwayConfig(18, 4, 1, ((1, 3), 1, (3, 5), 3))
    model = build_model(small_config(slow=slow))
    kernels = [[block.conv1.conv.kernel_size[0] for block in stage] for stage in model.backbone.slow_path.stages]
    assert kernels == [[1, 3], [1, 1], [3, 5], [3, 3]]


def test_lateral_appends_the_strided_fast_features():
    model = lively_model(small_config(lateral_norm=True))
    lateral = model.backbone.slow_path.conv1_lateral
    slow, fast = torch.randn(2, 8, 2, 3, 3), torch.randn(2, 2, 8, 3, 3)
    with torch.inference_mode():
        fused = lateral(slow, fast)
        expected = F.relu(lateral.bn(F.conv3d(fast, lateral.conv.weight, stride=(4, 1, 1), padding=(3, 0, 0))))
    assert fused[:, :8].equal(slow)
    torch.testing.assert_close(fused[:, 8:], expected)


def test_lateral_without_norm_is_linear():
    lateral = build_model(small_config()).backbone.slow_path.conv1_lateral
    assert lateral.bn is None
    fused = lateral(torch.zeros(1, 8, 2, 3, 3), torch.randn(1, 2, 8, 3, 3))
    assert (fused[:, 8:] < 0).any()


def test_initialisation_follows_kaiming_fan_out():
    model = build_model(small_config(slow=slow_pathway(18)))
    for module in model.modules():
        if isinstance(module, nn.Conv3d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.weight[0, 0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert model.head.fc_cls.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert model.head.fc_cls.bias.eq(0).all()


@pytest.mark.parametrize("zero", [True, False])
def test_zero_init_residual_silences_every_branch(zero):
    model = build_model(small_config(fast_depth=18, zero_init_residual=zero))
    for pathway in (model.backbone.slow_path, model.backbone.fast_path):
        for stage in pathway.stages:
            for block in stage:
                last = block.conv3 if hasattr(block, "conv3") else block.conv2
                assert last.bn.weight.eq(0).all() == zero
                assert block.conv1.bn.weight.eq(1).all()


def features(side):
    """Maps of the small network's widths."""
    return torch.randn(2, 256, 2, side, side), torch.randn(2, 64, 8, side, side)


def test_head_concatenates_fast_then_slow():
    model = lively_model(small_config())
    slow, fast = features(2)
    pooled = torch.cat([fast.mean((2, 3, 4)), slow.mean((2, 3, 4))], 1)
    torch.testing.assert_close(model.head((slow, fast)), model.head.fc_cls(pooled))


def test_sliding_heads_average_logits_or_probabilities_over_windows():
    model = lively_model(small_config(head_pooling="sliding", head_window=(2, 2)))
    softmax = lively_model(small_config(head_pooling="sliding_softmax", head_window=(2, 2)))
    softmax.load_state_dict(model.state_dict())
    slow, fast = features(3)
    at = [
        model.head.fc_cls(torch.cat([x[..., h : h + 2, w : w + 2].mean((2, 3, 4)) for x in (fast, slow)], 1))
        for h in (0, 1)
        for w in (0, 1)
    ]
    torch.testing.assert_close(model.head((slow, fast)), torch.stack(at).mean(0))
    torch.testing.assert_close(softmax.head((slow, fast)).softmax(1), torch.stack(at).softmax(2).mean(0))


def test_heads_agree_where_the_map_is_one_window():
    states = lively_model(small_config()).state_dict()
    probabilities = []
    for pooling in ("global", "sliding", "sliding_softmax"):
        model = build_model(small_config(head_pooling=pooling, head_window=(2, 2))).eval()
        model.load_state_dict(states)
        torch.manual_seed(0)
        probabilities.append(model.head(features(2)).softmax(1))
    torch.testing.assert_close(probabilities[1], probabilities[0])
    torch.testing.assert_close(probabilities[2], probabilities[0])


def test_gradients_reach_every_parameter():
    model = lively_model(
        small_config(18, 18, lateral_norm=True, head_pooling="sliding_softmax", head_window=(1, 1))
    ).train()
    F.cross_entropy(model(torch.randn(2, 3, 4, 32, 32)), torch.tensor([0, 3])).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_dropout_acts_in_training_only():
    model = build_model(small_config(dropout=0.9))
    maps = features(1)
    assert not model.head(maps).equal(model.head(maps))
    model.eval()
    assert model.head(maps).equal(model.head(maps))


def test_state_dict_keys_are_mmaction2s():
    keys = list(build_model(small_config(lateral_norm=True)).state_dict())
    assert keys[:2] == ["backbone.slow_path.conv1.conv.weight", "backbone.slow_path.conv1.bn.weight"]
    for key in (
        "backbone.slow_path.layer3_lateral.bn.running_var",
        "backbone.fast_path.layer4.0.downsample.conv.weight",
        "cls_head.fc_cls.bias",
    ):
        assert key in keys


@pytest.fixture(scope="module")
def model():
    return build_model(small_config(18, 18)).eval()


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        (torch.zeros(3, 8, 32, 32), ValueError, r"clip must be \(N, 3, T, H, W\), got shape \(3, 8, 32, 32\)"),
        (torch.zeros(1, 2, 3, 8, 32, 32), ValueError, "flatten the views"),
        (torch.zeros(1, 1, 8, 32, 32), ValueError, "clip must have 3 channels in dimension 1, got 1"),
        (torch.zeros(1, 8, 3, 32, 32), ValueError, "move the channels"),
        (torch.zeros(1, 3, 30, 32, 32), ValueError, "multiple of 4 .*, got 30"),
        (torch.zeros(1, 3, 2, 32, 32), ValueError, "multiple of 4 .*, got 2"),
        (torch.zeros(1, 3, 0, 32, 32), ValueError, "multiple of 4 .*, got 0"),
        (torch.zeros(1, 3, 8, 0, 32), ValueError, "height and width"),
        (torch.zeros(1, 3, 8, 32, 32, dtype=torch.uint8), TypeError, "floating point, got torch.uint8"),
        (torch.zeros(1, 3, 8, 32, 32, dtype=torch.int64), TypeError, "floating point, got torch.int64"),
        (torch.zeros(1, 3, 8, 32, 32, device="meta"), ValueError, "device cpu, got meta"),
        ([torch.zeros(1, 3, 2, 32, 32), torch.zeros(1, 3, 8, 32, 32)], TypeError, "one tensor .* got list"),
    ],
)
def test_wrong_clips_are_named(model, clip, error, message):
    with pytest.raises(error, match=message):
        model(clip)


def test_smallest_clip_and_empty_batch_work(model):
    assert model(torch.zeros(1, 3, 4, 1, 1)).shape == (1, 5)
    assert model(torch.zeros(0, 3, 4, 32, 32)).shape == (0, 5)


def test_window_larger_than_the_map_is_named():
    model = build_model(small_config(18, 18, head_pooling="sliding")).eval()
    with pytest.raises(ValueError, match=r"sliding window \(7, 7\), got \(1, 1\)"):
        model(torch.zeros(1, 3, 4, 32, 32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resample_rate": 6}, "multiple of speed_ratio"),
        ({"fusion_kernel": 4}, "fusion_kernel must be odd, got 4"),
        ({"num_classes": 0}, "num_classes must be positive"),
        ({"frame_sampling": "random"}, "frame_sampling must be one of"),
        ({"head_pooling": "max"}, "head_pooling must be one of"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"frame_sampling": "linspace", "resample_rate": 8}, "equal to speed_ratio"),
    ],
)
def test_wrong_configurations_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((20, 8, 1, (1, 1, 1, 1)), "depth must be one of"),
        ((50, 0, 1, (1, 1, 1, 1)), "base_channels must be positive"),
        ((50, 8, 2, (1, 1, 1, 1)), "must be odd"),
        ((50, 8, 1, (1, 1, 1)), "4 stages"),
        ((50, 8, 1, ((1, 1), 1, 1, 1)), "blocks a stage"),
    ],
)
def test_wrong_pathways_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PathwayConfig(*arguments)


def test_configuration_survives_json():
    config = small_config(101, 50, head_window=(4, 4), normalization=UNIFORM, frame_sampling="linspace")
    assert SlowFastConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config != dataclasses.replace(config, normalization=IMAGENET)


@pytest.mark.parametrize("sampling", ["strided", "linspace"])
def test_checks_frame_choice_and_head_compile_to_one_graph(sampling):
    model = build_model(small_config(18, 18, frame_sampling=sampling)).eval()

    def ends(clip, slow, fast):
        model.backbone.check_clip(clip)
        return *model.backbone.split(clip), model.head((slow, fast))

    arguments = torch.randn(1, 3, 8, 32, 32), torch.randn(1, 64, 2, 2, 2), torch.randn(1, 16, 8, 2, 2)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(ends, backend="eager", fullgraph=True)(*arguments), ends(*arguments))
