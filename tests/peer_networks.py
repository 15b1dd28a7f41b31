"""Checkpoints as other code bases write them, and what their networks compute from them, in plain functions."""

import pickle

import torch
import torch.nn.functional as F

ENTRIES_OF_CAFFE2 = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}


def pyslowfast_name(key: str) -> str:
    """PySlowFast's name of an mmaction2 entry."""
    if key.startswith("cls_head"):
        return key.replace("cls_head.fc_cls", "head.projection")
    _, path, module, *rest = key.split(".")
    kind, entry = rest[-2:]
    if module.endswith("_lateral"):
        stage = 1 if module == "conv1_lateral" else int(module[5]) + 1
        return f"s{stage}_fuse.{'conv_f2s' if kind == 'conv' else kind}.{entry}"
    pathway = f"pathway{('slow_path', 'fast_path').index(path)}"
    if module == "conv1":
        return f"s1.{pathway}_stem.{kind}.{entry}"
    block, convolution = rest[:2]
    branch = {"conv1": "branch2.a", "conv2": "branch2.b", "conv3": "branch2.c", "downsample": "branch1"}[convolution]
    return f"s{int(module[5]) + 1}.{pathway}_res{block}.{branch}{'_bn' if kind == 'bn' else ''}.{entry}"


def pytorchvideo_name(key: str) -> str:
    """pytorchvideo's name of an mmaction2 entry."""
    if key.startswith("cls_head"):
        return key.replace("cls_head.fc_cls", "blocks.6.proj")
    _, path, module, *rest = key.split(".")
    kind, entry = rest[-2].replace("bn", "norm"), rest[-1]
    if module.endswith("_lateral"):
        stage = 0 if module == "conv1_lateral" else module[5]
        return f"blocks.{stage}.multipathway_fusion.{'conv_fast_to_slow' if kind == 'conv' else kind}.{entry}"
    pathway = f"multipathway_blocks.{('slow_path', 'fast_path').index(path)}"
    if module == "conv1":
        return f"blocks.0.{pathway}.{kind}.{entry}"
    block, convolution = rest[:2]
    tail = {"conv1": "branch2.{}_a", "conv2": "branch2.{}_b", "conv3": "branch2.{}_c", "downsample": "branch1_{}"}
    return f"blocks.{module[5]}.{pathway}.res_blocks.{block}.{tail[convolution].format(kind)}.{entry}"


def caffe2_name(key: str) -> str:
    """Caffe2's name of an mmaction2 entry (of a network of depth 50), other than a batch counter."""
    if key.startswith("cls_head"):
        return "pred_w" if key.endswith("weight") else "pred_b"
    _, path, module, *rest = key.split(".")
    kind, entry = rest[-2:]
    tail = "w" if kind == "conv" else f"bn_{ENTRIES_OF_CAFFE2[entry]}"
    if module.endswith("_lateral"):
        after = "pool1" if module == "conv1_lateral" else f"res{int(module[5]) + 1}_{{}}_branch2c_bn"
        last = {"layer1_lateral": 2, "layer2_lateral": 3, "layer3_lateral": 5}.get(module)
        return f"t_{after.format(last)}_subsample_{tail}"
    prefix = "t_" if path == "fast_path" else ""
    if module == "conv1":
        return f"{prefix}{'conv1' if kind == 'conv' else 'res_conv1'}_{tail}"
    branch = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "downsample": "1"}[rest[1]]
    return f"{prefix}res{int(module[5]) + 1}_{rest[0]}_branch{branch}_{tail}"


def peer_weights(model, name) -> dict[str, torch.Tensor]:
    """The state of ``model`` under another code base's names, the classifier's columns as [slow | fast]."""
    state = model.state_dict()
    if name is caffe2_name:
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    weights = {name(key): value.clone() for key, value in state.items()}
    fast = model.config.fast.channels[-1]
    key = name("cls_head.fc_cls.weight")
    weights[key] = weights[key].roll(-fast, 1)
    return weights


def save_caffe2(weights: dict[str, torch.Tensor], path):
    blobs = {key: value.numpy() for key, value in weights.items()}
    blobs.update({"lr": weights["pred_b"][:1].numpy(), "conv1_w_momentum": blobs["conv1_w"], "model_iter": 7})
    with open(path, "wb") as file:
        pickle.dump({"blobs": blobs}, file, protocol=2)


PYSLOWFAST_CFG = """\
BN:
  USE_PRECISE_STATS: true
DATA:
  MEAN:
  - 0.45
  - 0.45
  - 0.45
  NUM_FRAMES: {frames}
  SAMPLING_RATE: 2
  STD: [0.225, 0.225, 0.225]
  TEST_CROP_SIZE: 256
  TRAIN_CROP_SIZE: {crop}
DETECTION:
  ENABLE: {detection}
MODEL:
  ARCH: slowfast
  DROPOUT_RATE: 0.25
  HEAD_ACT: {activation}
NUM_GPUS: 8
RESNET:
  NUM_BLOCK_TEMP_KERNEL:
  - - 3
    - 3
  STRIDE_1X1: {stride_1x1}
SLOWFAST:
  ALPHA: {alpha}
  BETA_INV: 8
TEST:
  NUM_ENSEMBLE_VIEWS: 10
  NUM_SPATIAL_CROPS: 3
"""


def pyslowfast_cfg(**values) -> str:
    defaults = {"frames": 32, "crop": 224, "alpha": 4, "activation": "softmax"}
    return PYSLOWFAST_CFG.format(**{**defaults, "detection": "false", "stride_1x1": "false", **values})


def fair_forward(weights: dict[str, torch.Tensor], clip, alpha: int, window: int, softmax: bool) -> torch.Tensor:
    """What PySlowFast (``softmax``: probabilities) and pytorchvideo (logits) compute, from PySlowFast's names."""

    def conv(name, x, stride=(1, 1, 1)):
        weight = weights[f"{name}.weight"]
        return F.conv3d(x, weight, stride=stride, padding=[size // 2 for size in weight.shape[2:]])

    def norm(name, x):
        mean, variance, weight, bias = (
            weights[f"{name}.{entry}"] for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)

    def residual_stage(stage, pathway, x):
        block = 0
        while f"s{stage}.pathway{pathway}_res{block}.branch2.a.weight" in weights:
            name = f"s{stage}.pathway{pathway}_res{block}"
            stride = (1, 2, 2) if block == 0 and stage > 2 else (1, 1, 1)
            y = F.relu(norm(f"{name}.branch2.a_bn", conv(f"{name}.branch2.a", x)))
            y = F.relu(norm(f"{name}.branch2.b_bn", conv(f"{name}.branch2.b", y, stride)))
            y = norm(f"{name}.branch2.c_bn", conv(f"{name}.branch2.c", y))
            if block == 0:
                x = norm(f"{name}.branch1_bn", conv(f"{name}.branch1", x, stride))
            x = F.relu(x + y)
            block += 1
        return x

    frames = clip.shape[2]
    slow = clip.index_select(2, torch.linspace(0, frames - 1, frames // alpha).long())
    paths = [slow, clip]
    for stage in range(1, 6):
        for pathway, x in enumerate(paths):
            if stage == 1:
                stem = f"s1.pathway{pathway}_stem"
                x = F.relu(norm(f"{stem}.bn", conv(f"{stem}.conv", x, (1, 2, 2))))
                paths[pathway] = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
            else:
                paths[pathway] = residual_stage(stage, pathway, x)
        if stage < 5:
            fused = conv(f"s{stage}_fuse.conv_f2s", paths[1], (alpha, 1, 1))
            paths[0] = torch.cat([paths[0], F.relu(norm(f"s{stage}_fuse.bn", fused))], 1)
    pooled = [F.avg_pool3d(x, (x.shape[2], window, window), stride=1) for x in paths]
    x = torch.cat(pooled, 1).permute(0, 2, 3, 4, 1)
    x = F.linear(x, weights["head.projection.weight"], weights["head.projection.bias"])
    return (x.softmax(4) if softmax else x).mean((1, 2, 3))
