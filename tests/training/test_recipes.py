import dataclasses

import pytest

from slowfast_ext.models import get_config, list_models
from slowfast_ext.training import RECIPES, format_config, read_config, read_settings, zoo_config
from slowfast_ext.training.loop import epochs_of

K400 = "slowfast_{}_kinetics400_rgb{}"
STHV1 = "slowfast_r50_16x8x1_22e_sthv1_rgb"


@pytest.fixture(scope="module")
def settings():
    return {name: read_settings(zoo_config(name)) for name in list_models()}


def test_every_configuration_of_the_zoo_has_a_recipe():
    assert list(RECIPES) == list_models()


def test_the_recipe_trains_the_network_of_the_zoo(settings):
    for name, found in settings.items():
        assert found.model.network == get_config(name), name


# name, workers, videos, epochs, policy, steps, precise BN (iterations, interval), validation, checkpoint, test views.
# Facts of the published configurations; rows as on the zoo page.
TABLE = [
    (K400.format("r50_4x16x1_256e", ""), 2, 8, 256, "cosine", (), None, 5, 4, None),
    (K400.format("r50_video_4x16x1_256e", ""), 2, 8, 256, "cosine", (), None, 5, 4, None),
    (K400.format("prebn_r50_4x16x1_256e", ""), 4, 8, 256, "cosine", (), (200, 1), 5, 4, None),
    (K400.format("r50_8x8x1_256e", ""), 2, 8, 256, "cosine", (), None, 5, 4, None),
    (K400.format("r50_8x8x1_256e", "_steplr"), 2, 8, 256, "step", (94, 154, 196), None, 5, 4, None),
    (K400.format("multigrid_r50_8x8x1_358e", ""), 4, 8, 358, "step", (94, 154, 196), (200, 3), 3, 3, None),
    (K400.format("prebn_r50_8x8x1_256e", "_steplr"), 2, 8, 256, "step", (94, 154, 196), (200, 5), 5, 4, None),
    (K400.format("r101_r50_4x16x1_256e", ""), 2, 8, 256, "cosine", (), None, 5, 4, 10),
    (K400.format("r101_8x8x1_256e", ""), 2, 8, 256, "cosine", (), None, 5, 4, 10),
    (K400.format("r152_r50_4x16x1_256e", ""), 2, 8, 256, "cosine", (), None, 5, 4, 8),
    (STHV1, 2, 4, 22, "step", (14, 18), None, 1, 1, None),
]


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_recipes_are_the_published_ones(settings, row):
    name, workers, videos, epochs, policy, steps, precise, evaluation, checkpoint, views = row
    found = settings[name]
    assert (found.train_loader.workers_per_gpu, found.train_loader.videos_per_gpu) == (workers, videos)
    assert epochs_of(found) == epochs
    assert (found.schedule.policy, found.schedule.steps) == (policy, steps)
    assert (found.precise_bn and (found.precise_bn.num_iters, found.precise_bn.interval)) == precise
    assert (found.evaluation.interval, found.checkpoint.interval) == (evaluation, checkpoint)
    assert found.model.max_testing_views == views
    assert (found.multigrid is not None) == ("multigrid" in name)

    sthv1 = name == STHV1
    optimizer, schedule = found.optimizer, found.schedule
    assert optimizer.lr == (0.06 if sthv1 else 0.1)
    assert optimizer.weight_decay == (1e-6 if sthv1 else 1e-4)
    assert (optimizer.momentum, optimizer.nesterov, optimizer.clip_norm) == (0.9, False, 40)
    assert (schedule.warmup, schedule.warmup_by_epoch) == ((510, False) if sthv1 else (34, True))
    assert (schedule.warmup_ratio, schedule.min_lr) == (0.1, 0)
    assert found.base_batch_size == 8 * videos
    assert found.evaluation.start == (18 if sthv1 else None)
    assert found.evaluation.metrics == ("top_k_accuracy",) + (() if sthv1 else ("mean_class_accuracy",))


def test_clips_are_the_published_ones(settings):
    for name, found in settings.items():
        sthv1 = name == STHV1
        train, val = found.train.clip, found.val.clip
        assert (train.sampling.clip_len, train.sampling.frame_interval) == (64 if sthv1 else 32, 2)
        assert (train.transform.crop, train.transform.crop_size, train.transform.flip) == ("random_resized", 224, 0.5)
        assert train.transform.short_side == (None if sthv1 else 256)
        assert train.transform.area_range == (0.08, 1.0)
        assert (val.transform.crop, val.transform.crop_size) == ("center", 256 if sthv1 else 224)
        assert found.train.videos == ("video" in name)
        assert train.normalization.mean == (123.675, 116.28, 103.53)
    flips = settings[STHV1].train.clip.transform.flip_labels
    assert flips == {2: 4, 4: 2, 30: 41, 41: 30, 52: 66, 66: 52}
    assert settings[STHV1].train.filename_tmpl.format(7) == "00007.jpg"
    assert settings[TABLE[0][0]].train.filename_tmpl.format(7) == "img_00007.jpg"


def test_a_recipe_survives_being_written(tmp_path):
    for name in list_models():
        path = tmp_path / f"{name}.py"
        path.write_text(format_config(zoo_config(name)))
        assert read_config(path) == zoo_config(name)


def test_the_misspelling_of_the_page_is_understood_and_unknown_names_get_the_nearest():
    name = K400.format("prebn_r50_4x16x1_256e", "")
    assert zoo_config(name.replace("prebn", "perbn")) == zoo_config(name)
    with pytest.raises(ValueError, match="did you mean slowfast_r50_4x16x1_256e_kinetics400_rgb"):
        zoo_config("slowfast_r50_4x16x1_kinetics400_rgb")


# The published 8x8 configuration as its own repository states it: bases, variables, trailing remarks.
MODEL = """
model = dict(
    type='Recognizer3D',
    backbone=dict(
        type='ResNet3dSlowFast',
        pretrained=None,
        resample_rate=8,  # tau
        speed_ratio=8,  # alpha
        channel_ratio=8,  # beta_inv
        slow_pathway=dict(
            type='resnet3d', depth=50, pretrained=None, lateral=True, conv1_kernel=(1, 7, 7), dilations=(1, 1, 1, 1),
            conv1_stride_t=1, pool1_stride_t=1, inflate=(0, 0, 1, 1), norm_eval=False),
        fast_pathway=dict(
            type='resnet3d', depth=50, pretrained=None, lateral=False, base_channels=8, conv1_kernel=(5, 7, 7),
            conv1_stride_t=1, pool1_stride_t=1, norm_eval=False)),
    cls_head=dict(type='SlowFastHead', in_channels=2304, num_classes=400, spatial_type='avg', dropout_ratio=0.5),
    train_cfg=None,
    test_cfg=dict(average_clips='prob'))
"""
RUNTIME = """
checkpoint_config = dict(interval=1)
log_config = dict(interval=20, hooks=[dict(type='TextLoggerHook')])
dist_params = dict(backend='nccl')
log_level = 'INFO'
load_from = None
resume_from = None
workflow = [('train', 1)]
opencv_num_threads = 0
mp_start_method = 'fork'
"""
CHILD = """
_base_ = ['_base_/model.py', '_base_/runtime.py']
model = dict(backbone=dict(resample_rate=4, speed_ratio=4, slow_pathway=dict(fusion_kernel=7)))
dataset_type = 'RawframeDataset'
data_root = 'data/kinetics400/rawframes_train'
data_root_val = 'data/kinetics400/rawframes_val'
ann_file_train = 'data/kinetics400/kinetics400_train_list_rawframes.txt'
ann_file_val = 'data/kinetics400/kinetics400_val_list_rawframes.txt'
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_bgr=False)
train_pipeline = [
    dict(type='SampleFrames', clip_len=32, frame_interval=2, num_clips=1),
    dict(type='RawFrameDecode'),
    dict(type='Resize', scale=(-1, 256)),
    dict(type='RandomResizedCrop'),
    dict(type='Resize', scale=(224, 224), keep_ratio=False),
    dict(type='Flip', flip_ratio=0.5),
    dict(type='Normalize', **img_norm_cfg),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='Collect', keys=['imgs', 'label'], meta_keys=[]),
    dict(type='ToTensor', keys=['imgs', 'label'])
]
val_pipeline = [
    dict(type='SampleFrames', clip_len=32, frame_interval=2, num_clips=1, test_mode=True),
    dict(type='RawFrameDecode'),
    dict(type='Resize', scale=(-1, 256)),
    dict(type='CenterCrop', crop_size=224),
    dict(type='Normalize', **img_norm_cfg),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='Collect', keys=['imgs', 'label'], meta_keys=[]),
    dict(type='ToTensor', keys=['imgs'])
]
test_pipeline = [
    dict(type='SampleFrames', clip_len=32, frame_interval=2, num_clips=10, test_mode=True),
    dict(type='RawFrameDecode'),
    dict(type='Resize', scale=(-1, 256)),
    dict(type='ThreeCrop', crop_size=256),
    dict(type='Normalize', **img_norm_cfg),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='Collect', keys=['imgs', 'label'], meta_keys=[]),
    dict(type='ToTensor', keys=['imgs'])
]
data = dict(
    videos_per_gpu=8,
    workers_per_gpu=2,
    test_dataloader=dict(videos_per_gpu=1),
    train=dict(type=dataset_type, ann_file=ann_file_train, data_prefix=data_root, pipeline=train_pipeline),
    val=dict(type=dataset_type, ann_file=ann_file_val, data_prefix=data_root_val, pipeline=val_pipeline),
    test=dict(type=dataset_type, ann_file=ann_file_val, data_prefix=data_root_val, pipeline=test_pipeline))
evaluation = dict(interval=5, metrics=['top_k_accuracy', 'mean_class_accuracy'])
optimizer = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.0001)  # this lr is used for 8 gpus
optimizer_config = dict(grad_clip=dict(max_norm=40, norm_type=2))
lr_config = dict(policy='CosineAnnealing', min_lr=0, warmup='linear', warmup_by_epoch=True, warmup_iters=34)
total_epochs = 256
checkpoint_config = dict(interval=4)
work_dir = './work_dirs/slowfast_r50_8x8x1_256e_kinetics400_rgb'
find_unused_parameters = False
"""


def test_a_configuration_in_the_form_of_the_page_is_the_recipe(tmp_path, settings):
    (tmp_path / "_base_").mkdir()
    (tmp_path / "_base_" / "model.py").write_text(MODEL)
    (tmp_path / "_base_" / "runtime.py").write_text(RUNTIME)
    (tmp_path / "child.py").write_text(CHILD)
    found = read_settings(read_config(tmp_path / "child.py"))
    expected = settings[K400.format("r50_8x8x1_256e", "")]
    # Only the recipe of the zoo knows the batch of its rate, only the file names a folder.
    changed = {"base_batch_size": None, "work_dir": "./work_dirs/slowfast_r50_8x8x1_256e_kinetics400_rgb"}
    assert found == dataclasses.replace(expected, **changed)
