"""Clips that are made, not decoded, in the process itself; and a configuration of a network small enough for them."""

import copy
from typing import Any

import torch

from slowfast_ext.data import EpochSampler
from slowfast_ext.training import DataSource

CLASSES = 3


class SyntheticDataset:
    """Noise around a brightness that tells the class. As in real data, seed, epoch and index decide a sample."""

    def __init__(self, settings, num_classes, seed, length=12):
        clip = settings.clip
        self.frames, self.size = clip.sampling.clip_len, clip.transform.crop_size
        self.num_classes, self.seed, self.length = num_classes, seed, length
        self.test, self.epoch = clip.test_mode, 0

    def __len__(self):
        return self.length

    def set_epoch(self, epoch):
        self.epoch = epoch

    def sample(self, index, size=None):
        frames, height, width = size or (self.frames, self.size, self.size)
        generator = torch.Generator().manual_seed(1000 * (0 if self.test else self.epoch + 1) + index + 7 * self.seed)
        label = index % self.num_classes
        noise = torch.randint(0, 80, (frames, height, width, 3), generator=generator)
        return (noise + 80 * label).clamp(max=255).to(torch.uint8), label


class InProcessLoader:
    """What the loop uses of :class:`slowfast_ext.data.ClipLoader`."""

    def __init__(self, dataset, batch_size, *, sampler, drop_last=False, workers=1, pin_memory=False):
        self.dataset, self.batch_size, self.sampler, self.drop_last = dataset, batch_size, sampler, drop_last
        self.closed = False

    def __len__(self):
        if self.batch_size is None:
            return len(self.sampler)
        return self.sampler.num_batches(self.batch_size, self.drop_last)

    def __iter__(self):
        if isinstance(self.sampler, EpochSampler):
            batches = self.sampler.batches(self.batch_size, self.drop_last)
        else:
            batches = iter(self.sampler)
        for batch in batches:
            items = [item if isinstance(item, tuple) else (item, None) for item in batch]
            clips, labels = zip(*(self.dataset.sample(*item) for item in items), strict=True)
            clip = torch.stack(clips)
            yield {
                "clip": clip.unsqueeze(1) if self.dataset.test else clip,
                "label": torch.tensor(labels),
                "index": torch.tensor([index for index, _ in items]),
                "errors": [],
            }

    def close(self):
        self.closed = True


SOURCE = DataSource(SyntheticDataset, InProcessLoader)


def pipeline(*, test: bool, frames=8, size=32) -> list[dict[str, Any]]:
    crop = [{"type": "Resize", "scale": (-1, size)}, {"type": "CenterCrop", "crop_size": size}]
    if not test:
        crop = [{"type": "RandomResizedCrop"}, {"type": "Resize", "scale": (size, size), "keep_ratio": False}]
    return [
        {"type": "DecordInit"},
        {"type": "SampleFrames", "clip_len": frames, "frame_interval": 1, "num_clips": 1, "test_mode": test},
        {"type": "DecordDecode"},
        *crop,
        {"type": "Normalize", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_bgr": False},
        {"type": "FormatShape", "input_format": "NCTHW"},
        {"type": "Collect", "keys": ["imgs", "label"], "meta_keys": []},
        {"type": "ToTensor", "keys": ["imgs", "label"]},
    ]


def small_configuration(**keys: Any) -> dict[str, Any]:
    """Two pathways of depth 18 with 8 and 1 channels, clips of 8 frames of 32 x 32, 3 epochs of 6 batches."""
    pathway = {"type": "resnet3d", "depth": 18}
    part = {"type": "VideoDataset", "ann_file": "list.txt", "data_prefix": "."}
    config = {
        "model": {
            "type": "Recognizer3D",
            "backbone": {
                "type": "ResNet3dSlowFast",
                "resample_rate": 4,
                "speed_ratio": 4,
                "channel_ratio": 8,
                "slow_pathway": {**pathway, "lateral": True, "base_channels": 8, "conv1_kernel": (1, 7, 7)},
                "fast_pathway": {**pathway, "base_channels": 1, "conv1_kernel": (5, 7, 7)},
            },
            "cls_head": {"type": "SlowFastHead", "num_classes": CLASSES, "dropout_ratio": 0.5},
        },
        "data": {
            "videos_per_gpu": 2,
            "workers_per_gpu": 1,
            "train": {**part, "pipeline": pipeline(test=False)},
            "val": {**part, "pipeline": pipeline(test=True)},
        },
        "optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
        "optimizer_config": {"grad_clip": {"max_norm": 40, "norm_type": 2}},
        "lr_config": {
            "policy": "CosineAnnealing",
            "min_lr": 0,
            "warmup": "linear",
            "warmup_by_epoch": True,
            "warmup_iters": 1,
            "warmup_ratio": 0.1,
        },
        "total_epochs": 3,
        "evaluation": {"interval": 1},
        "checkpoint_config": {"interval": 1},
        "log_config": {"interval": 2},
    }
    config.update(copy.deepcopy(keys))
    return config
