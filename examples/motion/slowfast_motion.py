"""A small SlowFast for the videos of make_videos.py: depth 18, 16 slow and 8 fast channels, clips of 16 x 64 x 64."""

root = "data/motion"
normalize = dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_bgr=False)
end = [
    normalize,
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="Collect", keys=["imgs", "label"], meta_keys=[]),
    dict(type="ToTensor", keys=["imgs", "label"]),
]
sample = dict(type="SampleFrames", clip_len=16, frame_interval=1, num_clips=1)
train_pipeline = [
    dict(type="DecordInit"),
    sample,
    dict(type="DecordDecode"),
    # Speeds are classes: the scale must not change as much as for Kinetics, where crops have 8 to 100 % of the area.
    dict(type="RandomResizedCrop", area_range=(0.5, 1.0)),
    dict(type="Resize", scale=(64, 64), keep_ratio=False),
    # In the mirror left is right, and clockwise is counterclockwise.
    dict(type="Flip", flip_ratio=0.5, flip_label_map={0: 2, 2: 0, 1: 3, 3: 1, 4: 5, 5: 4}),
] + end
val_pipeline = [
    dict(type="DecordInit"),
    dict(test_mode=True, **sample),
    dict(type="DecordDecode"),
    dict(type="Resize", scale=(-1, 64)),
    dict(type="CenterCrop", crop_size=64),
] + end
test_pipeline = [
    dict(type="DecordInit"),
    dict(type="SampleFrames", clip_len=16, frame_interval=1, num_clips=2, test_mode=True),
    dict(type="DecordDecode"),
    dict(type="Resize", scale=(-1, 64)),
    dict(type="ThreeCrop", crop_size=64),
] + end
data = dict(
    videos_per_gpu=16,
    workers_per_gpu=1,
    test_dataloader=dict(videos_per_gpu=1),
    train=dict(type="VideoDataset", ann_file=f"{root}/train.txt", data_prefix=root, pipeline=train_pipeline),
    val=dict(type="VideoDataset", ann_file=f"{root}/val.txt", data_prefix=root, pipeline=val_pipeline),
    test=dict(type="VideoDataset", ann_file=f"{root}/val.json", data_prefix=root, pipeline=test_pipeline),
)
model = dict(
    type="Recognizer3D",
    backbone=dict(
        type="ResNet3dSlowFast",
        resample_rate=4,
        speed_ratio=4,
        channel_ratio=2,
        slow_pathway=dict(type="resnet3d", depth=18, base_channels=16, conv1_kernel=(1, 7, 7), lateral=True),
        fast_pathway=dict(type="resnet3d", depth=18, base_channels=8, conv1_kernel=(5, 7, 7), lateral=False),
    ),
    cls_head=dict(type="SlowFastHead", num_classes=6, dropout_ratio=0.2),
    test_cfg=dict(average_clips="prob"),
)
optimizer = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4)
optimizer_config = dict(grad_clip=dict(max_norm=40, norm_type=2))
lr_config = dict(policy="CosineAnnealing", min_lr=0, warmup="linear", warmup_iters=24, warmup_ratio=0.1)
total_epochs = 16
evaluation = dict(interval=4, metrics=["top_k_accuracy", "mean_class_accuracy"])
checkpoint_config = dict(interval=4)
log_config = dict(interval=8, hooks=[dict(type="TextLoggerHook")])
