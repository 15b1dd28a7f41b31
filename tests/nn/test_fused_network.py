"""The twins of stem, head and backbone, which are compared with the plain ones inside whole networks."""

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from fused_cases import block_tolerance, lively
from small_networks import lively_model, small_config
from test_fused_blocks import RecordOperators
from torch import nn
from torch.testing import assert_close

from slowfast_ext import accelerate, explain, ops, restore
from slowfast_ext.models import Bottleneck3d, SlowFastHead, Stem
from slowfast_ext.nn import FusedBlock, FusedBottleneck3d, FusedHead, FusedSlowFastBackbone, FusedStem, residual

CONV, PAIR, LATERAL_INTO, STEM, HEAD = (
    f"slowfast_ext::{name}" for name in ("conv3d_bn_relu", "conv3d_bn_relu_pair", "lateral_fuse", "stem", "pool_head")
)
VARIANTS = {
    "strided": {},
    "strided_sparse": {"resample_rate": 8, "speed_ratio": 4, "lateral_norm": True},
    "linspace": {"frame_sampling": "linspace", "lateral_norm": True},
    "sliding": {"head_pooling": "sliding", "head_window": (2, 1)},
    "sliding_softmax": {"head_pooling": "sliding_softmax", "head_window": (2, 1)},
}
variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())


def network(**fields):
    """Depth 18, with stems that the operator serves."""
    config = small_config(slow_depth=18, fast_depth=18, **fields)
    return lively_model(dataclasses.replace(config, fast=dataclasses.replace(config.fast, base_channels=8)))


def clip(batch=1, dtype=torch.float32, frames=16):
    return torch.randn(batch, 3, frames, 40, 36, dtype=dtype)


def close(actual, expected, model, dtype=torch.float32):
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, **block_tolerance(model, dtype, expected))


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_network_gives_the_same_scores(fields, dtype):
    model, x = network(**fields).to(dtype), clip(2, dtype)
    with torch.inference_mode():
        expected = model(x)
        close(accelerate(model, strict=True)(x), expected, model, dtype)
        close(model(x[:, :, :8]), restore(model)(x[:, :, :8]), model, dtype)  # another clip length


@variants
def test_autocast_gives_the_plain_dtype_and_values(fields):
    model, x = network(**fields), clip()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        close(accelerate(model, strict=True)(x), expected, model, torch.bfloat16)


def operators_of(model, x):
    with torch.no_grad():
        model(x)
        with RecordOperators() as recorded:
            model(x)
    return recorded.names


@variants
def test_nothing_is_concatenated_and_no_frame_is_copied(fields):
    model = accelerate(network(**fields), strict=True)
    names = operators_of(model, clip())
    assert not {"aten::cat", "aten::copy_", "aten::index_select", "aten::max_pool3d_with_indices"} & set(names)
    assert names.count(STEM) == 2
    assert names.count(LATERAL_INTO) == 4
    assert names.count(HEAD) == 1
    convolutions = sum(isinstance(module, nn.Conv3d) for module in model.modules())
    assert names.count(PAIR) == 7  # the first blocks of the stages, but for the first of the fast pathway: no shortcut
    assert names.count(CONV) + 2 * names.count(PAIR) == convolutions - 2 - 4


def test_the_slow_side_writes_its_own_channels(monkeypatch):
    """Both writers get slices of one tensor, which the next stage reads."""
    places = []
    for name in ("conv3d_bn_relu", "lateral_fuse_into", "stem"):
        operator = getattr(ops, name)

        def note(*arguments, operator=operator, out=None, **options):
            places.append(out) if out is not None else None
            return operator(*arguments, **options) if out is None else operator(*arguments, **options, out=out)

        monkeypatch.setattr(ops, name, note)
    with torch.inference_mode():
        accelerate(network())(clip())
    assert len(places) == 8
    for slow, lateral in zip(places[::2], places[1::2], strict=True):
        assert slow.data_ptr() + slow.shape[1] * slow.element_size() == lateral.data_ptr()
        assert slow.stride() == lateral.stride()


def test_indices_of_frames_are_made_once_for_a_clip_length():
    model = accelerate(network(frame_sampling="linspace"))
    with torch.inference_mode():
        for frames in (16, 16, 8):
            model(clip(frames=frames))
    indices = {frames: tensor.tolist() for (frames, _), tensor in model.backbone.slow_frames.items()}
    assert indices == {16: [0, 5, 10, 15], 8: [0, 7]}
    assert not any(tensor.is_inference() for tensor in model.backbone.slow_frames.values())


def test_a_network_compiles_to_one_graph():
    torch._dynamo.reset()
    model, x = network(frame_sampling="linspace", lateral_norm=True), clip()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(accelerate(model, strict=True), fullgraph=True, backend="aot_eager")
        close(compiled(x), expected, model)


@pytest.mark.parametrize("frame_sampling", ["strided", "linspace"])
def test_a_network_exports_with_any_batch_and_number_of_frames(frame_sampling):
    model = network(frame_sampling=frame_sampling, lateral_norm=True)
    accelerate(model, strict=True).requires_grad_(False)
    batch, slow_frames = torch.export.Dim("N", min=1, max=64), torch.export.Dim("slow_frames", min=2, max=64)
    sizes = ({0: batch, 2: slow_frames * model.config.resample_rate},)
    with torch.no_grad():
        program = torch.export.export(model, (clip(2),), dynamic_shapes=sizes).module()
        restore(model)
        for x in (clip(3, frames=8), clip(1, frames=24)):
            close(program(x), model(x), model)
        with pytest.raises(AssertionError, match="Guard failed"):  # torch takes a size of 1 for a constant
            program(clip(1, frames=4))


@pytest.mark.parametrize("linspace", [False, True])
def test_hooks_inside_see_what_they_see_in_the_plain_network(linspace):
    model = network(frame_sampling="linspace" if linspace else "strided", lateral_norm=True)
    seen = {}
    for name in ("conv1", "layer1", "layer2.1", "layer2_lateral", "layer3_lateral"):
        module = model.backbone.slow_path.get_submodule(name)
        module.register_forward_hook(
            lambda module, inputs, output, name=name: seen.setdefault(name, []).append((*inputs, output))
        )
    x = clip()
    with torch.inference_mode():
        expected = model(x)
        close(accelerate(model, strict=True)(x), expected, model)
    assert len(seen) == 5
    for plain, fused in seen.values():
        for before, after in zip(plain, fused, strict=True):
            close(after, before, model)


def test_a_hook_may_replace_the_result_of_a_block():
    model = network(lateral_norm=True)
    path = model.backbone.slow_path
    path.conv1.register_forward_hook(lambda module, inputs, output: output * 1.5)
    path.layer1[1].register_forward_hook(lambda module, inputs, output: output + 0.5)
    path.layer2.register_forward_hook(lambda module, inputs, output: output - 0.5)
    path.layer3_lateral.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2, inputs[1]))
    x = clip()
    with torch.inference_mode():
        expected = model(x)
        close(accelerate(model, strict=True)(x), expected, model)


KEPT = ("conv1", "layer1.1", "layer1_lateral", "layer2.0", "layer4.1")


@pytest.mark.parametrize("kept", KEPT)
def test_any_block_of_a_fused_backbone_may_be_kept(kept):
    model, x = network(lateral_norm=True, frame_sampling="linspace"), clip()
    name = f"backbone.slow_path.{kept}"

    def where(candidate, module):
        return not f"{candidate}.".startswith(f"{name}.")

    with torch.inference_mode():
        expected = model(x)
        accelerate(model, where=where, strict=True)
        close(model(x), expected, model)
    assert not any(isinstance(module, FusedBlock) for module in model.get_submodule(name).modules())
    assert model.backbone.last_forward == "fused"
    assert sum(isinstance(module, FusedBlock) for module in model.modules()) == 23


def test_a_kept_backbone_has_fused_blocks_and_can_be_fused_later():
    model, x = network(), clip()
    with torch.inference_mode():
        expected = model(x)
        accelerate(model, where=lambda name, module: name != "backbone", strict=True)
        assert not isinstance(model.backbone, FusedSlowFastBackbone)
        close(model(x), expected, model)
        accelerate(model, strict=True)
        assert isinstance(model.backbone, FusedSlowFastBackbone)
        close(model(x), expected, model)


def test_parts_in_another_dtype_are_concatenated_as_the_plain_network_does():
    model = network(lateral_norm=True)
    for lateral in model.backbone.slow_path.laterals:
        lateral.double()
        lateral.register_forward_pre_hook(lambda module, inputs: (inputs[0], inputs[1].double()))
        lateral.register_forward_hook(lambda module, inputs, output: output.float())
    x = clip()
    with torch.inference_mode():
        expected = model(x)
        close(accelerate(model, strict=True)(x), expected, model)


def test_while_gradients_may_be_recorded_each_block_decides():
    model, x = network(lateral_norm=True).requires_grad_(False), clip()
    gradients = []
    for prepare in (lambda model: model, accelerate):
        x.requires_grad_()
        gradients.append(torch.autograd.grad(prepare(model)(x).sin().sum(), x)[0])
    assert "gradients may be recorded" in model.backbone.last_forward
    assert model.backbone.slow_path.layer1[0].last_forward == "fused"
    assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * gradients[0].abs().max().item())
    with torch.inference_mode():
        model(x)
    assert model.backbone.last_forward == "fused"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_of_a_network_runs_and_can_be_restored(duplicate):
    model, x = accelerate(network(frame_sampling="linspace")), clip()
    with torch.inference_mode():
        expected = model(x)
        other = duplicate(model)
        assert_close(other(x), expected, rtol=0, atol=0)
        close(restore(other)(x), expected, model)
    assert not any(isinstance(module, FusedBlock) for module in other.modules())


def test_threads_may_share_a_network():
    model, inputs = accelerate(network(frame_sampling="linspace")), [clip(frames=8 * (1 + i % 2)) for i in range(4)]
    results = [None] * len(inputs)

    def run(index):
        with torch.inference_mode():
            results[index] = model(inputs[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.inference_mode():
        for x, result in zip(inputs, results, strict=True):
            close(result, model(x), model)


def test_restore_puts_back_the_very_modules():
    model = network()
    modules = dict(model.named_modules())
    attributes = {name: set(module.__dict__) for name, module in modules.items()}
    with torch.inference_mode():
        accelerate(model)(clip())
    restore(model)
    assert dict(model.named_modules()) == modules
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda stem: setattr(stem, "relu", False), "it has no ReLU"),
        (lambda stem: setattr(stem.maxpool, "ceil_mode", True), "the pooling must be 1x3x3"),
        (lambda stem: setattr(stem, "conv", nn.Conv3d(3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3))), "the kernel takes"),
    ],
)
@pytest.mark.parametrize("frames", [None, torch.tensor([0, 2])])
def test_a_stem_that_the_operator_does_not_serve_runs_layer_by_layer(change, reason, frames):
    plain = lively(Stem(8, 5)).eval()
    change(plain)
    x = torch.randn(2, 3, 3, 17, 19)
    with torch.inference_mode():
        expected = plain(x if frames is None else x[:, :, frames])
        twin = accelerate(plain)
        close(twin(x, frames=frames), expected, twin)
    assert twin.layer_by_layer.startswith(reason)
    assert explain(twin).rows[0].outcome.startswith(f"FusedStem, layer by layer: {reason}")


def test_a_plain_forward_of_a_stem_selects_frames_too():
    twin, frames = accelerate(lively(Stem(8, 1)).eval()), torch.tensor([1, 1, 0])
    x = torch.randn(1, 3, 2, 8, 8)
    assert_close(twin(x, frames=frames), twin(x[:, :, frames]), rtol=0, atol=0)
    assert "gradients" in twin.last_forward


def with_hook(module, path):
    module.get_submodule(path).register_forward_hook(print)
    return module


@pytest.mark.parametrize(
    ("twin", "build", "reason"),
    [
        (FusedStem, lambda: with_hook(Stem(8, 1), "maxpool"), "maxpool has hooks, which a fused block cannot run"),
        (FusedStem, lambda: with_hook(Stem(8, 1), "conv"), "conv has hooks, which a fused block cannot run"),
        (FusedHead, lambda: with_hook(SlowFastHead(small_config()), "fc_cls"), "fc_cls has hooks"),
        (FusedHead, lambda: with_hook(SlowFastHead(small_config()), "dropout"), "dropout has hooks"),
    ],
)
def test_stem_and_head_have_reasons(twin, build, reason):
    assert twin.reason_against(build()).startswith(reason)


def test_a_head_in_evaluation_with_dropout_in_training_drops_out():
    model = accelerate(network(), strict=True)
    model.head.dropout.train()
    with torch.inference_mode():
        model(clip())
    assert model.head.last_forward == "dropout is in training mode"


def test_a_map_smaller_than_the_window_is_the_plain_heads_error():
    model = accelerate(network(head_pooling="sliding"), strict=True)
    with torch.inference_mode(), pytest.raises(ValueError, match="at least as large as the sliding window"):
        model(clip())


BLOCK = (lambda: Bottleneck3d(32, 8, temporal_kernel=3), (1, 32, 3, 6, 5))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        BLOCK,
        (lambda: Bottleneck3d(8, 8, temporal_kernel=3), (1, 8, 2, 5, 5)),
        (lambda: Bottleneck3d(32, 16, 2, 3), (2, 32, 3, 7, 6)),
    ],
    ids=["identity", "projection", "stride"],
)
def test_a_bottleneck_is_one_operator_where_there_is_a_kernel(build, shape, monkeypatch):
    plain, x = lively(build()).eval(), torch.randn(shape)
    monkeypatch.setattr(residual, "_bottleneck_reason", lambda *arguments: None)  # as on a GPU
    with torch.inference_mode():
        expected = plain(x)
        twin = accelerate(plain)
        close(twin(x), expected, twin)
        out = torch.empty_like(expected).to(memory_format=torch.channels_last_3d)
        assert twin(x, out=out) is out
        close(out, expected, twin)
        with RecordOperators() as recorded:
            twin(x)
    assert recorded.names == ["slowfast_ext::fast_bottleneck"]
    assert twin.layer_by_layer is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: None, "there are kernels for torch.float16 and torch.bfloat16"),
        (lambda block: block.bfloat16(), "the kernels are CUDA-only"),
        (lambda block: setattr(block.conv1, "relu", False), "the convolutions are not"),
        (lambda block: setattr(block.conv2, "bn", None), "the convolutions are not"),
    ],
)
def test_a_bottleneck_without_a_kernel_runs_layer_by_layer(change, reason):
    block = lively(BLOCK[0]()).eval()
    change(block)
    x = torch.randn(BLOCK[1], dtype=block.conv1.conv.weight.dtype)
    with torch.inference_mode():
        expected = block(x)
        twin = accelerate(block, strict=True)
        assert isinstance(twin, FusedBottleneck3d)
        close(twin(x), expected, twin, x.dtype)
    assert twin.layer_by_layer.startswith(reason)
    assert explain(twin).rows[0].outcome.startswith(f"FusedBottleneck3d, layer by layer: {reason}")


def test_which_kernel_is_asked_once_for_a_dtype_and_device(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "fast_bottleneck_reason_against", lambda *a, **k: asked.append(k["dtype"]) or "none")
    residual._cached_bottleneck_reason.cache_clear()
    twin = accelerate(lively(BLOCK[0]()).eval())
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            twin.to(dtype)(torch.randn(BLOCK[1], dtype=dtype))
    residual._cached_bottleneck_reason.cache_clear()
    assert asked == [torch.float32, torch.bfloat16]
