import pytest

import slowfast_ext
from slowfast_ext.models import IMAGENET, ZOO, get_config


def test_twelve_rows_share_eleven_configurations():
    assert len(ZOO) == 12
    assert slowfast_ext.list_models() == list(dict.fromkeys(row.name for row in ZOO))
    assert len(slowfast_ext.list_models()) == 11


def test_rows_hold_the_published_results():
    rows = [(row.source, row.gpus, row.top1, row.top5, row.memory_mib, row.videos_per_second) for row in ZOO]
    assert rows[2] == ("short-side 320", "8x2", 76.0, 92.54, 6203, 1.6)
    assert rows[4] == ("short-side 320", "8x3", 76.94, 92.8, 9062, 1.3)
    assert rows[10] == ("short-side 256", "8x1", 77.13, 93.20, 10077, None)
    assert rows[11] == ("height 100", "8", 49.67, 79.00, 9293, None)
    assert [row.top1 for row in ZOO].index(max(row.top1 for row in ZOO)) == 9


def test_kinetics_rows_are_tested_on_30_views_of_32_frames():
    for row in ZOO[:11]:
        config = row.network
        assert (config.clip_len, config.frame_interval, config.num_classes) == (32, 2, 400)
        assert (config.test_clips, config.test_crops, config.test_short_side, config.test_crop_size) == (
            10,
            3,
            256,
            256,
        )
        assert config.normalization == IMAGENET
        assert config.resample_rate == config.speed_ratio == (8 if "4x16" in row.name else 4)
        assert config.fusion_kernel == (5 if "4x16" in row.name else 7)


def test_something_something_row_is_tested_on_one_view_of_64_frames():
    config = ZOO[11].network
    assert (config.clip_len, config.frame_interval, config.num_classes) == (64, 2, 174)
    assert (config.test_clips, config.test_crops) == (1, 1)
    assert ZOO[11].pretrained in slowfast_ext.list_models()


def test_three_configurations_have_lateral_norm():
    assert [row.name for row in ZOO if row.network.lateral_norm] == [
        "slowfast_r50_8x8x1_256e_kinetics400_rgb_steplr",
        "slowfast_multigrid_r50_8x8x1_358e_kinetics400_rgb",
        "slowfast_prebn_r50_8x8x1_256e_kinetics400_rgb_steplr",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "configs/recognition/slowfast/slowfast_prebn_r50_4x16x1_256e_kinetics400_rgb.py",
        "configs\\recognition\\slowfast\\slowfast_prebn_r50_4x16x1_256e_kinetics400_rgb.py",
        "configs/recognition/slowfast/slowfast_perbn_r50_4x16x1_256e_kinetics400_rgb.py",
    ],
)
def test_configuration_paths_are_names_and_the_zoos_misspelling_is_understood(name):
    assert get_config(name) is get_config("slowfast_prebn_r50_4x16x1_256e_kinetics400_rgb")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'slowfast_r50_8x8x1'; did you mean .*slowfast_r50_8x8x1_256e"):
        slowfast_ext.create_model("slowfast_r50_8x8x1")
    with pytest.raises(ValueError, match=r"got 'xyz'; see list_models\(\)"):
        slowfast_ext.create_model("xyz")


def test_create_model_sets_the_classes():
    model = slowfast_ext.create_model("slowfast_r50_4x16x1_256e_kinetics400_rgb", num_classes=7)
    assert model.head is model.cls_head
    assert model.head.fc_cls.out_features == model.config.num_classes == 7
    assert model.training
