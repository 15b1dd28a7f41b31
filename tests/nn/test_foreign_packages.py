"""Networks of torchvision, pytorchvideo and mmaction2, where these are installed."""

import copy
import importlib
import importlib.util
import sys
import types

import pytest
import torch
from fused_cases import block_tolerance, lively
from kept import KeptTensors
from torch import nn
from torch.testing import assert_close

from slowfast_ext import accelerate, explain, restore
from slowfast_ext.nn import FusedTraced
from slowfast_ext.nn.program import Fused

_definitions = torch.library.Library("torchvision", "FRAGMENT")


def load(module: str):
    """The module, or a skip with the reason."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module.partition('.')[0]} is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module} does not import: {error}")


def torchvision_network(name):
    try:
        video = load("torchvision.models.video")
    except RuntimeError:  # the CUDA wheel beside a torch for CPUs lacks two operators
        for module in [module for module in sys.modules if module.startswith("torchvision")]:
            del sys.modules[module]
        for operator in ("nms", "qnms"):
            _definitions.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        video = load("torchvision.models.video")
    clip = torch.randn(1, 3, 16, 224, 224) if name == "s3d" else torch.randn(1, 3, 4, 48, 48)
    return getattr(video, name)(weights=None), clip


def pytorchvideo_network(name):
    network = getattr(load("pytorchvideo.models.hub"), name)(pretrained=False)
    clip = torch.randn(1, 3, 64 if "16x8" in name else 32, 224, 224)
    return network, clip[:, :, ::4] if name == "slow_r50" else [clip[:, :, ::4], clip]


def mmaction2_network(name):
    class Missing(types.ModuleType):
        DRN = object

    for module in ("mmaction.models.localizers.drn", "mmaction.models.localizers.drn.drn"):  # not in the wheel
        if importlib.util.find_spec("mmaction") is not None:
            sys.modules.setdefault(module, Missing(module))
    backbones = load("mmaction.models.backbones")
    pathway = {"type": "resnet3d", "depth": 50, "pretrained": None, "norm_eval": False}
    pathway |= {"conv1_stride_t": 1, "pool1_stride_t": 1}
    slow = {**pathway, "lateral": True, "conv1_kernel": (1, 7, 7), "inflate": (0, 0, 1, 1)}
    slow |= {"lateral_norm": name.endswith("lateral_norm")}
    fast = {**pathway, "lateral": False, "conv1_kernel": (5, 7, 7), "base_channels": 8}
    network = backbones.ResNet3dSlowFast(pretrained=None, slow_pathway=slow, fast_pathway=fast)
    network.init_weights()
    return network, torch.randn(1, 3, 16, 64, 64)


# Name to how it is built, and how many of its convolutions are fused.
NETWORKS = {
    "r3d_18": (torchvision_network, "20 of 20"),
    "mc3_18": (torchvision_network, "20 of 20"),
    "r2plus1d_18": (torchvision_network, "37 of 37"),
    "s3d": (torchvision_network, "77 of 78"),
    "slow_r50": (pytorchvideo_network, "53 of 53"),
    "slowfast_r50": (pytorchvideo_network, "110 of 110"),
    "slowfast_r101": (pytorchvideo_network, "212 of 212"),
    "slowfast_16x8_r101_50_50": (pytorchvideo_network, "212 of 212"),
    "ResNet3dSlowFast": (mmaction2_network, "106 of 110"),
    "ResNet3dSlowFast_lateral_norm": (mmaction2_network, "110 of 110"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_another_package_is_fused_and_restored(name):
    build, expected_count = NETWORKS[name]
    model, clip = build(name)
    lively(model).eval()
    calls, modules, keys = [], dict(model.named_modules()), list(model.state_dict())
    attributes = {name: dict(module.__dict__) for name, module in modules.items()}

    def run():
        with torch.inference_mode():
            result = model(list(clip) if isinstance(clip, list) else clip)  # which some change
        return result if isinstance(result, tuple) else (result,)

    expected = run()
    accelerate(model)
    last = [twin for twin in model.modules() if isinstance(twin, FusedTraced)][-1]
    handle = last.register_forward_hook(lambda *arguments: calls.append(arguments))
    for actual, plain in zip(run(), expected, strict=True):
        assert_close(actual, plain, **block_tolerance(model, torch.float32, plain))
        print(f"{name}: largest relative error {((actual - plain).abs().max() / plain.abs().max()).item():.1e}")
    handle.remove()

    convolutions = {name for name, module in modules.items() if isinstance(module, nn.Conv3d)}
    fused = set()
    for path, twin in model.named_modules():
        if isinstance(twin, FusedTraced):
            assert twin.last_forward == "fused"
            steps = [step for step, _, _ in twin.program.steps if isinstance(step, Fused)]
            fused |= {f"{path}.{step.conv}" if path else step.conv for step in steps}
    assert f"{len(fused)} of {len(convolutions)}" == expected_count
    assert {row.name for row in explain(model).kept if row.reason} >= convolutions - fused
    assert len(calls) == 1

    assert list(model.state_dict()) == keys
    restore(model)
    assert dict(model.named_modules()) == modules
    assert {name: dict(module.__dict__) for name, module in modules.items()} == attributes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NETWORKS if "101" not in name])
def test_a_network_of_another_package_trains_as_the_plain_one(name):
    """In float64, without dropout, and without pooling of fixed size, so that a small clip will do."""
    plain, _ = NETWORKS[name][0](name)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if name == "s3d":
        plain.avgpool = nn.AdaptiveAvgPool3d(1)
    elif hasattr(plain, "blocks"):
        del plain.blocks[5:]
    lively(plain).double().train()
    twin = accelerate(copy.deepcopy(plain), mode="training")
    clip = torch.randn(2, 3, 16 if name == "s3d" else 8, 64, 64, dtype=torch.float64)
    results, kept = [], []
    for model in (plain, twin):
        x = clip.clone().requires_grad_()
        with KeptTensors([model]) as keeping:
            y = model([x[:, :, ::4], x] if name == "slowfast_r50" else x)
        kept.append(keeping.bytes)
        y = tuple(y) if isinstance(y, (tuple, list)) else (y,)
        sum(part.square().mean() for part in y).backward()
        results.append([*y, x.grad, *(parameter.grad for parameter in model.parameters()), *model.buffers()])
    for actual, expected in zip(*reversed(results), strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert_close(actual, expected, rtol=1e-9, atol=1e-9 * max(1, expected.abs().max().item()))
    assert {row.reason for row in explain(twin).rows if row.twin} == {None}
    assert kept[1] < 0.8 * kept[0]
    print(f"{name}: {kept[1] / kept[0]:.2f} of {kept[0] / 2**20:.0f} MiB kept")
