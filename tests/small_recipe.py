"""A configuration file, in mmaction2's form, that trains in seconds: two classes, two epochs, clips of 8 x 32 x 32."""

# ROOT stands for the folder of the videos, of train.txt and of val.txt.
CONFIG = """
clip = dict(type='SampleFrames', clip_len=8, frame_interval=1, num_clips=1)
scale = dict(type='Normalize', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_bgr=False)
end = [scale, dict(type='FormatShape', input_format='NCTHW'), dict(type='Collect', keys=['imgs', 'label'])]
train_pipeline = [
    dict(type='DecordInit'), clip, dict(type='DecordDecode'),
    dict(type='RandomResizedCrop'), dict(type='Resize', scale=(32, 32), keep_ratio=False),
    dict(type='Flip', flip_ratio=0.5)] + end
val_pipeline = [
    dict(type='DecordInit'), dict(test_mode=True, **clip), dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 32)), dict(type='CenterCrop', crop_size=32)] + end
test_pipeline = [
    dict(type='DecordInit'), dict(clip_len=8, frame_interval=1, num_clips=2, test_mode=True, type='SampleFrames'),
    dict(type='DecordDecode'), dict(type='Resize', scale=(-1, 32)), dict(type='ThreeCrop', crop_size=32)] + end
root = 'ROOT'
data = dict(
    videos_per_gpu=2,
    workers_per_gpu=1,
    train=dict(type='VideoDataset', ann_file=f'{root}/train.txt', data_prefix=root, pipeline=train_pipeline),
    val=dict(type='VideoDataset', ann_file=f'{root}/val.txt', data_prefix=root, pipeline=val_pipeline),
    test=dict(type='VideoDataset', ann_file=f'{root}/val.txt', data_prefix=root, pipeline=test_pipeline))
model = dict(
    type='Recognizer3D',
    backbone=dict(
        type='ResNet3dSlowFast', resample_rate=4, speed_ratio=4, channel_ratio=8,
        slow_pathway=dict(type='resnet3d', depth=18, base_channels=8, lateral=True),
        fast_pathway=dict(type='resnet3d', depth=18, base_channels=1, lateral=False)),
    cls_head=dict(type='SlowFastHead', num_classes=2, dropout_ratio=0.5))
optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4)
optimizer_config = dict(grad_clip=dict(max_norm=40, norm_type=2))
lr_config = dict(policy='CosineAnnealing', min_lr=0)
total_epochs = 2
"""
