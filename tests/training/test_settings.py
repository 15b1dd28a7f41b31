import copy

import pytest
from synthetic import pipeline, small_configuration

from slowfast_ext.training import apply_overrides, read_settings, zoo_config


def _settings(*overrides):
    return read_settings(apply_overrides(small_configuration(), overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", "keys at the top must be known ones, got 'optimiser'; did you mean optimizer"),
        ("optimizer.momentun=0.9", "keys in optimizer must be known ones, got 'momentun'; did you mean momentum?"),
        ("model.backbone.slow_pathway.dept=50", "in model.backbone.slow_pathway must .*did you mean depth?"),
        ("data.train.pipeline.1.clip_length=8", "in data.train.pipeline.1 must .*did you mean clip_len?"),
        ("data.videos_per_gpus=8", "did you mean videos_per_gpu"),
        ("lr_config.policy=cosin", "must be one of .*got 'cosin'; did you mean cosine"),
        ("data.train.pipeline.3.type=RandomResizeCrop", "got 'RandomResizeCrop'; did you mean RandomResizedCrop"),
        ("optimizer.type=Adam", "optimizer.type must be 'SGD', got 'Adam'"),
        ("optimizer.lr=0", "optimizer.lr must be above 0, got 0"),
        ("optimizer.lr=high", "optimizer.lr must be a number or a whole number, got 'high'"),
        ("optimizer.nesterov=1", "optimizer.nesterov must be True or False, got 1"),
        ("optimizer_config.grad_clip.norm_type=1", "norm_type must be one of"),
        ("total_epochs=2.5", "total_epochs must be a whole number, got 2.5"),
        ("total_epochs=0", "total_epochs must be at least 1, got 0"),
        ("model.cls_head.in_channels=2304", "in_channels must be 72, got 2304"),
        ("model.backbone.channel_ratio=4", r"channel_ratio must be .*\(8 / 1\), got 4"),
        ("model.backbone.slow_pathway.depth=51", "depth must be one of .*got 51"),
        ("model.backbone.slow_pathway.pretrained=torchvision://resnet50", "must be a file, not fetched"),
        ("model.backbone.resample_rate=3", "resample_rate must be a multiple of speed_ratio"),
        ("data.train.pipeline.1.clip_len=6", "clip_len of data.train must be a multiple of resample_rate 4, got 6"),
        ("data.train.pipeline.1.test_mode=True", "data.train.pipeline must have random clips"),
        ("data.val.pipeline.1.test_mode=False", "data.val.pipeline must have test_mode=True"),
        ("data.train.type=RawframeDataset", r"must decode frames \(RawFrameDecode\), which its data set has"),
        ("lr_config.policy=step", "lr_config.step must be given, got nothing"),
        ("evaluation.metrics=[mean_average_precision]", r"must be among \['top_k_accuracy', .*got \['mean_average"),
        ("evaluation.metrics=[]", "evaluation.metrics must be among"),
        ("evaluation.save_best=top1", "save_best must be one of .*got 'top1'; did you mean top1_acc"),
        ("checkpoint_config.max_keep_ckpts=0", "must be at least 1, or -1 for all, got 0"),
        ("multigrid.long_cycle_factors=[[1,1]]", "policy must be step with multigrid, got cosine"),
        ("model.train_cfg.blending=1", "model.train_cfg must be None"),
        ("workflow=[('train', 1), ('val', 1)]", "workflow must be one of"),
    ],
)
def test_wrong_keys_and_values_are_named_with_the_nearest(override, message):
    with pytest.raises(ValueError, match=message):
        _settings(override)


def test_the_order_of_pipeline_steps_is_checked():
    config = small_configuration()
    steps = pipeline(test=False)
    steps[3], steps[5] = steps[5], steps[3]
    config["data"]["train"]["pipeline"] = steps
    with pytest.raises(ValueError, match="must come in the order init sample decode"):
        read_settings(config)
    del steps[3:6]
    with pytest.raises(ValueError, match="must have a crop"):
        read_settings(config)


def test_the_runtime_keys_of_mmaction2_are_understood():
    settings = _settings(
        "dist_params.backend=nccl",
        "log_level=INFO",
        "workflow=[('train', 1)]",
        "opencv_num_threads=0",
        "mp_start_method=fork",
        "find_unused_parameters=False",
        "cudnn_benchmark=True",
        "log_config.interval=7",
        "seed=3",
        "work_dir=somewhere",
    )
    assert settings.cudnn_benchmark
    assert settings.log_interval == 7
    assert (settings.seed, settings.work_dir) == (3, "somewhere")


def test_runner_and_total_epochs_are_two_names_for_one_thing():
    config = small_configuration()
    del config["total_epochs"]
    config["runner"] = {"type": "EpochBasedRunner", "max_epochs": 9}
    assert read_settings(config).epochs == 9


def test_the_configuration_is_left_as_it_was():
    config = zoo_config("slowfast_multigrid_r50_8x8x1_358e_kinetics400_rgb")
    before = copy.deepcopy(config)
    read_settings(config)
    assert config == before


def test_norms_other_than_plain_ones_are_chosen_in_the_backbone():
    assert _settings("model.backbone.norm_cfg.type=SyncBN").model.norm == "sync"
    settings = _settings("model.backbone.norm_cfg.type=SubBatchBN3D", "model.backbone.norm_cfg.num_splits=2")
    assert (settings.model.norm, settings.model.norm_splits) == ("sub_batch", 2)
