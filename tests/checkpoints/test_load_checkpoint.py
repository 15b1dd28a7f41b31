import dataclasses
import warnings

import pytest
import torch
from peer_networks import caffe2_name, peer_weights, pyslowfast_cfg, pyslowfast_name, pytorchvideo_name, save_caffe2
from small_networks import lively_model, small_config

import slowfast_ext
from slowfast_ext.checkpoints import Mismatch
from slowfast_ext.models import IMAGENET, UNIFORM, Normalization, build_model

FC_WEIGHT, FC_BIAS = "cls_head.fc_cls.weight", "cls_head.fc_cls.bias"


@pytest.fixture(scope="module")
def plain():
    """R50 8x8 without lateral norm."""
    return lively_model(small_config())


@pytest.fixture(scope="module")
def normed():
    """R50 8x8 with lateral norm."""
    return lively_model(small_config(lateral_norm=True))


@pytest.fixture
def save(tmp_path):
    def write(content, name="file.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def behaviour(config):
    return config.frame_sampling, config.normalization, config.head_pooling, config.resample_rate, config.clip_len


@pytest.mark.parametrize(
    ("depths", "kernel", "norm", "rate"),
    [((50, 50), 5, False, 8), ((50, 50), 7, True, 4), ((101, 50), 5, False, 8), ((18, 34), 7, False, 4)],
)
def test_bare_mmaction2_weights_rebuild_their_network(save, depths, kernel, norm, rate):
    config = small_config(*depths, fusion_kernel=kernel, lateral_norm=norm, resample_rate=rate, speed_ratio=rate)
    original = lively_model(config)
    model = slowfast_ext.load_checkpoint(save(original.state_dict()))
    assert model.config == config
    assert model.training
    report = model.load_report
    assert report.matched == list(original.state_dict())
    assert [report.missing, report.unexpected, report.mismatched] == [[], [], []]
    assert "resample_rate=" in str(report)
    assert "taken from the published networks" in str(report)


def test_habits_of_each_code_base(plain, normed, save, tmp_path):
    files = {
        "mmaction2 0.x": save({"meta": {"mmaction_version": "0.24.1"}, "state_dict": plain.state_dict()}, "a"),
        "mmaction2 1.x": save({"meta": {"mmengine_version": "0.10"}, "state_dict": plain.state_dict()}, "b"),
        "PySlowFast": save({"model_state": peer_weights(normed, pyslowfast_name)}, "c"),
        "pytorchvideo": save({"model_state": peer_weights(normed, pytorchvideo_name)}, "d"),
        "PySlowFast (Caffe2)": tmp_path / "e",
    }
    save_caffe2(peer_weights(normed, caffe2_name), tmp_path / "e")
    loaded = {name: slowfast_ext.load_checkpoint(path) for name, path in files.items()}
    assert [model.load_report.source_format for model in loaded.values()] == list(files)
    assert {name: behaviour(model.config) for name, model in loaded.items()} == {
        "mmaction2 0.x": ("strided", IMAGENET, "global", 4, 32),
        "mmaction2 1.x": ("strided", IMAGENET, "global", 4, 32),
        "PySlowFast": ("linspace", UNIFORM, "sliding_softmax", 4, 32),
        "pytorchvideo": ("linspace", UNIFORM, "sliding", 4, 32),
        "PySlowFast (Caffe2)": ("linspace", UNIFORM, "sliding_softmax", 4, 32),
    }
    assert set(loaded["PySlowFast (Caffe2)"].load_report.unexpected) == {"lr", "conv1_w_momentum"}


def test_torch_file_called_pkl_is_recognised(normed, save):
    model = slowfast_ext.load_checkpoint(save({"model_state": peer_weights(normed, pyslowfast_name)}, "AVA.pkl"))
    assert model.load_report.source_format == "PySlowFast"


def test_legacy_torch_file_is_read(plain, tmp_path):
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = slowfast_ext.load_checkpoint(tmp_path / "old.pth")
    assert all(value.equal(plain.state_dict()[name]) for name, value in model.state_dict().items())


MMACTION2_CONFIG = """
img_norm_cfg = dict(mean=[0, 2.5, 3.5], std=[4, 5, 6], to_bgr=False)
model = dict(
    type='Recognizer3D',
    backbone=dict(type='ResNet3dSlowFast', resample_rate=8, speed_ratio=4, channel_ratio=8),
    cls_head=dict(type='SlowFastHead', num_classes=400, dropout_ratio=0.25))
test_pipeline = [
    dict(type='SampleFrames', clip_len=64, frame_interval=1, num_clips=5, test_mode=True),
    dict(type='Resize', scale=(-1, 320)),
    dict(type='CenterCrop', crop_size=288),
    dict(type='Normalize', **img_norm_cfg)]
total_epochs = __import__('os').system('touch {trace}')
"""


@pytest.mark.parametrize("entry", ["config", "cfg"])
def test_settings_of_mmaction2_are_read_and_not_run(plain, save, tmp_path, entry):
    text = MMACTION2_CONFIG.replace("{trace}", str(tmp_path / "trace"))
    model = slowfast_ext.load_checkpoint(save({"meta": {entry: text}, "state_dict": plain.state_dict()}))
    config = model.config
    assert (config.resample_rate, config.speed_ratio, config.dropout) == (8, 4, 0.25)
    assert (config.clip_len, config.frame_interval) == (64, 1)
    assert (config.test_clips, config.test_crops, config.test_short_side, config.test_crop_size) == (5, 1, 320, 288)
    assert config.normalization == Normalization((0, 2.5, 3.5), (4, 5, 6))
    assert not model.load_report.notes
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("text", ["model = dict(", "model = 3", "model = dict(backbone=dict(resample_rate='8'))", "\0"])
def test_unusable_settings_leave_the_habits(plain, save, text):
    model = slowfast_ext.load_checkpoint(save({"meta": {"config": text}, "state_dict": plain.state_dict()}))
    assert model.config == plain.config


def test_settings_of_pyslowfast(normed, save):
    cfg = pyslowfast_cfg(frames=64, crop=160, alpha=8, activation="sigmoid", detection="true")
    model = slowfast_ext.load_checkpoint(save({"model_state": peer_weights(normed, pyslowfast_name), "cfg": cfg}))
    config = model.config
    assert behaviour(config) == ("linspace", Normalization((114.75,) * 3, (57.375,) * 3), "sliding", 8, 64)
    assert (config.head_window, config.dropout, config.frame_interval) == ((5, 5), 0.25, 2)
    assert (config.test_clips, config.test_crops, config.test_crop_size, config.test_short_side) == (10, 3, 256, 256)
    assert any("sigmoid" in note for note in model.load_report.notes)
    assert any("trained for detection" in note for note in model.load_report.notes)


def test_pytorchvideos_16x8_r101_50_50_is_told_by_its_temporal_kernels(save):
    partial = (3,) * 6 + (1,) * 17
    config = small_config(101, 101, lateral_norm=True, fusion_kernel=5)
    slow = dataclasses.replace(config.slow, temporal_kernels=(1, 1, partial, 3))
    fast = dataclasses.replace(config.fast, temporal_kernels=(3, 3, partial, 3))
    with torch.device("meta"):
        meta = build_model(dataclasses.replace(config, slow=slow, fast=fast))
    weights = {pytorchvideo_name(key): torch.zeros(value.shape) for key, value in meta.state_dict().items()}
    found = slowfast_ext.load_checkpoint(save({"model_state": weights})).config
    assert (found.slow, found.fast) == (slow, fast)
    assert (found.resample_rate, found.fusion_kernel, found.clip_len) == (4, 5, 64)


def test_other_number_of_classes_leaves_a_new_classifier(plain, save):
    path = save(plain.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = slowfast_ext.load_checkpoint(path, num_classes=9)
    assert model.head.fc_cls.out_features == model.config.num_classes == 9
    assert model.load_report.mismatched == [Mismatch(FC_WEIGHT, (5, 320), (9, 320)), Mismatch(FC_BIAS, (5,), (9,))]
    assert model.head.fc_cls.weight.std().item() == pytest.approx(0.01, rel=0.1)
    stem = "backbone.slow_path.conv1.conv.weight"
    assert model.state_dict()[stem].equal(plain.state_dict()[stem])


def test_loading_into_a_model_reports_what_did_not_fit(plain, save):
    state = dict(plain.state_dict())
    del state["backbone.fast_path.conv1.bn.weight"]
    odd = "backbone.fast_path.layer1.0.conv1.conv.weight"
    state[odd] = torch.zeros(2, 2, 5, 1, 1)
    state["cls_head.extra"] = torch.zeros(3)
    state["backbone.slow_path.extra"] = torch.zeros(3)
    model = build_model(plain.config)
    before = model.state_dict()[odd].clone()
    with pytest.warns(UserWarning, match="1 missing in the file: backbone.fast_path.conv1.bn.weight"):
        assert slowfast_ext.load_checkpoint(save(state), model) is model
    report = model.load_report
    assert report.missing == ["backbone.fast_path.conv1.bn.weight"]
    assert report.mismatched == [Mismatch(odd, (2, 2, 5, 1, 1), tuple(before.shape))]
    assert set(report.unexpected) == {"cls_head.extra", "backbone.slow_path.extra"}
    assert len(report.matched) == len(plain.state_dict()) - 2
    assert model.state_dict()[odd].equal(before)
    assert f"{odd} (2, 2, 5, 1, 1) -> {tuple(before.shape)}" in str(report)


def test_loading_weights_that_want_other_input_warns(normed, save):
    path = save({"model_state": peer_weights(normed, pyslowfast_name), "cfg": pyslowfast_cfg()})
    with pytest.warns(UserWarning, match="frame_sampling=linspace, the model has strided"):
        model = slowfast_ext.load_checkpoint(path, build_model(normed.config))
    assert len(model.load_report.notes) == 3
    assert [model.load_report.missing, model.load_report.mismatched] == [[], []]
    wanted = slowfast_ext.load_checkpoint(path).config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slowfast_ext.load_checkpoint(path, build_model(wanted))


def test_lateral_norm_that_the_file_lacks_is_reported(plain, normed, save):
    with pytest.warns(UserWarning, match="missing in the file"):
        model = slowfast_ext.load_checkpoint(save(plain.state_dict()), build_model(normed.config))
    assert len(model.load_report.missing) == 16
    assert all("_lateral.bn." in name for name in model.load_report.missing)


def test_create_model_loads_a_checkpoint_and_keeps_a_new_classifier(save):
    name = "slowfast_r50_4x16x1_256e_kinetics400_rgb"
    path = save(slowfast_ext.create_model(name, num_classes=3).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = slowfast_ext.create_model(name, num_classes=2, checkpoint=path)
    assert [mismatch.name for mismatch in model.load_report.mismatched] == [FC_WEIGHT, FC_BIAS]
    with pytest.warns(UserWarning, match="of another shape"):
        slowfast_ext.create_model(name, checkpoint=path)


def test_classes_of_a_given_model_are_its_own(plain, save):
    with pytest.raises(ValueError, match=r"num_classes must be that of the given model \(5\), got 4"):
        slowfast_ext.load_checkpoint(save(plain.state_dict()), build_model(plain.config), num_classes=4)


def test_a_backbone_alone_needs_the_number_of_classes(plain, save):
    path = save({name: value for name, value in plain.state_dict().items() if name.startswith("backbone")})
    with pytest.raises(ValueError, match="num_classes must be given"):
        slowfast_ext.load_checkpoint(path)
    model = slowfast_ext.load_checkpoint(path, num_classes=6)
    assert model.load_report.missing == [FC_WEIGHT, FC_BIAS]


def test_a_network_with_a_hole_cannot_be_rebuilt(plain, save):
    state = dict(plain.state_dict())
    del state["backbone.slow_path.layer2.1.conv2.conv.weight"]
    with pytest.raises(ValueError, match=r"whole network, got\n.*\n.*layer2\.1\.conv2\.conv\.weight"):
        slowfast_ext.load_checkpoint(save(state))


def test_a_tensor_of_another_shape_cannot_be_rebuilt(plain, save):
    state = {**plain.state_dict(), "backbone.slow_path.layer2.1.conv2.conv.weight": torch.zeros(16, 16, 3, 3, 3)}
    with pytest.raises(ValueError, match=r"1 of another shape: .*layer2.1.conv2.conv.weight \(16, 16, 3, 3, 3\)"):
        slowfast_ext.load_checkpoint(save(state))


def test_unknown_depth_is_named(plain, save):
    state = {name: value for name, value in plain.state_dict().items() if ".layer3.5." not in name}
    with pytest.raises(
        ValueError, match=r"slow_path must have the stages of a ResNet.* got \(3, 4, 5, 3\) bottlenecks"
    ):
        slowfast_ext.load_checkpoint(save(state))


@pytest.mark.parametrize("extra", ["s4.pathway0_nonlocal1.conv_theta.weight", "module.s3.pathway0_nonlocal3.bn.bias"])
def test_non_local_networks_are_refused(normed, save, extra):
    weights = {**peer_weights(normed, pyslowfast_name), extra: torch.zeros(1)}
    with pytest.raises(ValueError, match=r"non-local blocks are not supported, got s[34]\.pathway0_nonlocal"):
        slowfast_ext.load_checkpoint(save({"model_state": weights}))


def test_strides_on_the_first_convolution_are_refused(normed, save):
    weights = peer_weights(normed, pyslowfast_name)
    with pytest.raises(ValueError, match="STRIDE_1X1"):
        slowfast_ext.load_checkpoint(save({"model_state": weights, "cfg": pyslowfast_cfg(stride_1x1="true")}))


@pytest.mark.parametrize("name", ["conv1.weight", "vit.encoder.layer.0.attention.weight", "backbone.conv1.conv.weight"])
@pytest.mark.parametrize("into_model", [False, True])
def test_other_networks_are_refused(plain, save, name, into_model):
    model = build_model(plain.config) if into_model else None
    with pytest.raises(ValueError, match=f"must hold a SlowFast network .* got entries such as .*{name}"):
        slowfast_ext.load_checkpoint(save({name: torch.zeros(4)}), model)


def test_a_model_that_nothing_fits_is_named(plain, save):
    with pytest.raises(ValueError, match="none of its 642 entries does"):
        slowfast_ext.load_checkpoint(save(plain.state_dict()), torch.nn.Linear(2, 2))
