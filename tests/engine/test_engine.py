"""The engine computes what the plain model does, however it is called, and refuses what it does not know."""

import copy
import dataclasses
import gc
import json
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_networks import lively_model, small_config
from torch import nn

import slowfast_ext
from slowfast_ext import InferenceEngine
from slowfast_ext.data import normalize
from slowfast_ext.engine import cpu, runtime
from slowfast_ext.engine.autotune import TOLERANCE, Tuner
from slowfast_ext.engine.cpu import CpuBackend
from slowfast_ext.engine.fused import FusedBackend
from slowfast_ext.engine.network import read_network
from slowfast_ext.models import fast_pathway

CONFIGS = {
    "8x8": {},
    "4x16 with lateral norm": {"resample_rate": 8, "speed_ratio": 8, "fusion_kernel": 5, "lateral_norm": True},
    "fast frames are skipped": {"resample_rate": 8, "speed_ratio": 4},
    "linspace, sliding window": {"frame_sampling": "linspace", "head_pooling": "sliding", "head_window": (2, 2)},
    "averaged probabilities": {"head_pooling": "sliding_softmax", "head_window": (1, 2)},
    "basic blocks": {"slow_depth": 18, "fast_depth": 18},
    "unequal depths": {"slow_depth": 34, "fast_depth": 50},
}


def make_engine(backend, model, dtype=torch.float32, **options):
    """An engine of this machine's backend, or of the GPU's operators in their CPU versions."""
    engine = InferenceEngine(model, dtype=dtype, **options)
    if backend == "fused" and engine.device.type == "cpu":
        tuner = Tuner(engine.device, "test", enabled=bool(options.get("autotune", True)))
        engine._backend = FusedBackend(read_network(model, dtype, engine.device), tuner, cuda_graph=False)
    return engine


def error(output, reference):
    return float(torch.linalg.vector_norm(output - reference) / torch.linalg.vector_norm(reference))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lively_model(small_config())


@pytest.fixture
def clip():
    return torch.randn(1, 3, 8, 64, 64)


@pytest.mark.parametrize("backend", ["onednn", "fused"])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_are_those_of_the_plain_model(fields, backend):
    model = lively_model(small_config(**fields))
    engine = make_engine(backend, model, autotune=False)
    mean, std = model.config.normalization.mean, model.config.normalization.std
    for shape in ((1, 16, 64, 64), (2, 8, 65, 79)):
        n, frames, height, width = shape
        clip = torch.randn(n, 3, frames, height, width)
        raw = torch.randint(0, 256, (n, frames, height, width, 3), dtype=torch.uint8)
        with torch.inference_mode():
            assert error(engine(clip), model(clip)) < 1e-5
            assert error(engine(raw), model(normalize(raw, mean, std))) < 1e-5
            assert error(engine(clip), model(clip)) < 1e-5  # the buffers hold another clip's numbers by now


@pytest.mark.parametrize("backend", ["onednn", "fused"])
def test_tuned_kernels_give_the_same_logits(model, clip, backend):
    engine = make_engine(backend, model)
    with torch.inference_mode():
        assert error(engine(clip), model(clip)) < 1e-5
    assert any("tuned" in step.why for step in engine.plan.steps)


@pytest.mark.parametrize("backend", ["onednn", "fused"])
def test_bfloat16_is_no_further_off_than_eager(backend):
    """Compared on several clips, since a single one may be lucky."""
    model = lively_model(small_config(slow_depth=50, fast_depth=50))
    clips = torch.randn(6, 3, 8, 64, 64)
    engine = make_engine(backend, model, dtype=torch.bfloat16, autotune=False)
    with torch.inference_mode():
        reference = model(clips)
        eager = copy.deepcopy(model).bfloat16()(clips.bfloat16()).float()
        assert error(engine(clips), reference) < 1.1 * error(eager, reference)


@pytest.mark.parametrize(("clips", "fold"), [(1, 2), (2, 2), (1, 4)])
def test_the_fast_stem_is_closer_to_float64_than_eager(clips, fold):
    """Its sums of 735 products are taken in three parts; with 4 frames folded the longest part has 588 of them."""
    torch.manual_seed(0)
    model = lively_model(small_config(fast=dataclasses.replace(fast_pathway(18), base_channels=8)))
    stem, device = model.backbone.fast_path.conv1, torch.device("cpu")
    backend = CpuBackend(read_network(model, torch.float32, device), Tuner(device, "test", enabled=False))
    x = torch.randn(clips, 3, 8, 64, 64).contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        exact = copy.deepcopy(stem).double()(x.double())
        result = backend._stem(backend.network.fast.stem, x.shape, None, fold)(x)
        assert error(result, exact) < (0.7 if fold == 2 else 0.9) * error(stem(x), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fold", [1, 2])
def test_pixels_computed_in_pairs_are_those_computed_one_by_one(fold, dtype):
    model = lively_model(small_config(fast=dataclasses.replace(fast_pathway(50), base_channels=8)))
    convolution = read_network(model, dtype, torch.device("cpu")).fast.stages[0][0].branch[1]
    assert convolution.weight.shape == (8, 8, 1, 3, 3)
    x = torch.randn(2, 8, 3, 7, 10).to(dtype, memory_format=torch.channels_last_3d)
    result = cpu._pixels(convolution, x.shape, fold)(x)
    assert result.is_contiguous(memory_format=torch.channels_last_3d)
    assert error(result.float(), cpu._plain_convolution(convolution, x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("frames", [None, [1, 3, 4, 7]])
@pytest.mark.parametrize("clips", [1, 2])
def test_the_fast_stem_in_bfloat16_is_rounded_once(clips, frames):
    """However many frames are computed at once, two of them with those of the clip as channels."""
    torch.manual_seed(0)
    model = lively_model(small_config(fast=dataclasses.replace(fast_pathway(18), base_channels=8))).bfloat16()
    stem, device = model.backbone.fast_path.conv1, torch.device("cpu")
    backend = CpuBackend(read_network(model, torch.bfloat16, device), Tuner(device, "test", enabled=False))
    fast = backend.network.fast.stem
    x = torch.randn(clips, 3, 8, 37, 50).bfloat16()
    shown = x if frames is None else x[:, :, frames]
    with torch.inference_mode():
        exact = F.conv3d(shown.double(), fast.weight.double(), fast.bias.double(), fast.stride, fast.padding)
        exact = stem.maxpool(exact.relu())
        for fold in (1, 2, 4):
            assert error(backend._stem(fast, x.shape, frames, fold)(x), exact) < 2**-8


@pytest.mark.parametrize("backend", ["onednn", "fused"])
def test_features_are_slow_then_fast_averages(model, clip, backend):
    engine = make_engine(backend, model, autotune=False)
    with torch.inference_mode():
        expected = torch.cat([features.mean((2, 3, 4)) for features in model.backbone(clip)], 1)
        torch.testing.assert_close(engine.features(clip), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["permuted", "channels_last_3d", "slice", "float64", "float16", "requires_grad"])
def test_any_layout_and_floating_type_of_the_clip_will_do(model, layout):
    clip = torch.randn(2, 8, 64, 64, 3).permute(0, 4, 1, 2, 3)
    if layout == "channels_last_3d":
        clip = clip.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "slice":
        clip = torch.randn(2, 5, 9, 70, 70)[:, 1:4, 1:, 3:67, 2:66]
    elif layout in ("float64", "float16"):
        clip = clip.to(getattr(torch, layout))
    elif layout == "requires_grad":
        clip.requires_grad_()
    before = clip.detach().clone()
    with torch.inference_mode():
        expected = model(clip.float())
        for backend in ("onednn", "fused"):
            engine = make_engine(backend, model, autotune=False)
            assert error(engine(clip), expected) < 1e-5
            assert torch.equal(clip, before)


def test_empty_batch(model):
    engine = InferenceEngine(model)
    assert engine(torch.randn(0, 3, 8, 64, 64)).shape == (0, 5)
    assert engine.features(torch.randn(0, 3, 8, 64, 64)).shape == (0, model.head.fc_cls.in_features)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_of_one_clip_reach_its_scores_and_no_others(model, value):
    clips = torch.randn(3, 3, 8, 64, 64)
    clips[1, 0, 5, 10, 10] = value
    engine = InferenceEngine(model, autotune=False)
    logits = engine(clips)
    assert logits[1].isnan().all()
    assert error(logits[::2], model(clips)[::2].detach()) < 1e-5


def test_a_change_of_shape_is_planned_anew_and_said_and_the_last_eight_are_kept(model, caplog):
    caplog.set_level("INFO")
    engine = InferenceEngine(model, autotune=False)
    for width in range(32, 52, 2):
        engine(torch.randn(1, 3, 4, 32, width))
        engine(torch.randn(1, 3, 4, 32, width))
    assert caplog.messages[0] == "InferenceEngine: planned for (1, 3, 4, 32, 32), now also for (1, 3, 4, 32, 34)"
    assert len(caplog.messages) == 9
    assert len(engine._programs) == 8
    known = set(map(id, engine._programs.values()))
    engine(torch.randn(1, 3, 4, 32, 50))
    assert set(map(id, engine._programs.values())) == known
    engine.clear()
    assert not engine._programs


def test_plan_shows_each_layer_with_kernel_reason_buffer_and_work(model, clip):
    engine = make_engine("fused", model, autotune=False)
    engine(clip)
    plan = engine.plan
    table = str(plan).splitlines()
    assert table[1].split() == ["layer", "kernel", "why", "buffer", "MB", "GFLOP", "floor", "us"]
    convolutions = sum(len(step.convolutions) for step in plan.steps)
    assert convolutions == sum(isinstance(module, nn.Conv3d) for module in model.modules())
    assert all(step.kernel and step.why for step in plan.steps)
    assert any("slow_path.layer3_lateral (joined)[128:" in line for line in table)
    assert f"arena of {plan.arena_bytes / 1e6:.4g} MB" in table[-3]
    assert "blocks of the fast pathway layer by layer" in "\n".join(table)


def test_plan_counts_what_the_layers_multiply(model, clip):
    multiplied = 0

    def count(module, inputs, output):
        nonlocal multiplied
        multiplied += 2 * output.numel() * module.weight[0].numel()

    handles = [
        module.register_forward_hook(count) for module in model.modules() if isinstance(module, (nn.Conv3d, nn.Linear))
    ]
    with torch.inference_mode():
        model(clip)
    for handle in handles:
        handle.remove()
    engine = InferenceEngine(model, autotune=False)
    engine(clip)
    assert sum(step.operations for step in engine.plan.steps) == multiplied


def test_plan_before_the_first_call_is_that_of_the_test_views():
    engine = InferenceEngine(lively_model(small_config(test_crop_size=32, test_short_side=32)), autotune=False)
    assert "(1, 3, 32, 32, 32)" in str(engine.plan)


@pytest.mark.parametrize("max_views", [None, "auto", 2, 7])
def test_video_averages_probabilities_over_its_views(model, max_views):
    views = torch.randint(0, 256, (5, 8, 64, 64, 3), dtype=torch.uint8)
    engine = InferenceEngine(model, max_views=max_views, autotune=False)
    mean, std = model.config.normalization.mean, model.config.normalization.std
    with torch.inference_mode():
        expected = model(normalize(views, mean, std)).softmax(1).mean(0)
    torch.testing.assert_close(engine.video(views), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(engine.video(views[:, None][0]), engine.video(views[:1]))


def test_video_halves_its_chunks_when_memory_runs_out(model, monkeypatch, caplog):
    engine = InferenceEngine(model, autotune=False)
    monkeypatch.setattr(engine, "_fitting_views", lambda view, count: 8)
    run, sizes = engine._run, []

    def limited(clip, output):
        sizes.append(len(clip))
        if len(clip) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(clip, output)

    views = torch.randn(7, 3, 4, 32, 32)
    with torch.inference_mode():
        expected = model(views).softmax(1).mean(0)
    monkeypatch.setattr(engine, "_run", limited)
    torch.testing.assert_close(engine.video(views), expected, rtol=1e-4, atol=1e-6)
    assert sizes == [7, 4, 2, 2, 2, 1]
    assert "going on with 2 views" in caplog.text


def test_a_fixed_number_of_views_that_does_not_fit_is_an_error(model, monkeypatch):
    engine = InferenceEngine(model, max_views=4, autotune=False)

    def full(clip, output):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "_run", full)
    with pytest.raises(torch.OutOfMemoryError):
        engine.video(torch.randn(4, 3, 4, 32, 32))


def in_threads(*calls):
    """The results of calls that run at the same time."""
    results = [None] * len(calls)

    def run(index):
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_share_an_engine(model):
    engine = InferenceEngine(model, autotune=False)
    clips = [torch.randn(1, 3, 8, 64, 64 + 2 * (index % 2)) for index in range(6)]
    results = in_threads(*(partial(engine, clip) for clip in clips))
    with torch.inference_mode():
        for clip, result in zip(clips, results, strict=True):
            assert error(result, model(clip)) < 1e-5


@pytest.mark.parametrize("backend", ["onednn", "fused"])
def test_two_engines_in_two_threads_do_not_disturb_each_other(clip, backend):
    models = [lively_model(small_config()) for _ in range(2)]
    engines = [make_engine(backend, model, autotune=False) for model in models]

    def several(engine):
        return [engine(clip) for _ in range(4)]

    results = in_threads(*(partial(several, engine) for engine in engines))
    with torch.inference_mode():
        for model, logits in zip(models, results, strict=True):
            expected = model(clip)
            assert all(error(each, expected) < 1e-5 for each in logits)


@pytest.mark.parametrize("backend", ["onednn", "fused"])
def test_autocast_around_an_engine_changes_nothing(model, clip, backend):
    engine, other = (make_engine(backend, model, autotune=False) for _ in range(2))
    expected = engine(clip)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine(clip), expected)
        assert torch.equal(other(clip), expected)  # planned here


def test_the_engine_is_a_snapshot_that_does_not_keep_the_model(clip):
    model = lively_model(small_config())
    engine = InferenceEngine(model, autotune=False)
    with torch.no_grad():
        expected = model(clip)
        for parameter in model.parameters():
            parameter.zero_()
    assert error(engine(clip), expected) < 1e-5
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_copying_an_engine_is_refused(model, duplicate):
    with pytest.raises(TypeError, match="an engine cannot be pickled or copied"):
        duplicate(InferenceEngine(model))


def test_results_require_no_gradient_and_are_the_callers_own(model, clip):
    for backend in ("onednn", "fused"):
        engine = make_engine(backend, model, autotune=False)
        first = engine(clip)
        kept = first.clone()
        engine(torch.randn_like(clip))
        assert torch.equal(first, kept)
        assert not first.requires_grad


def hooked(model):
    model.backbone.slow_path.layer2[1].conv2.register_forward_hook(lambda *_: None)


def replaced(model):
    model.backbone.fast_path.layer1[0] = nn.Identity().eval()


def patched(model):
    model.head.forward = lambda features: features


def grouped(model):
    conv = model.backbone.slow_path.layer1[0].conv2.conv
    model.backbone.slow_path.layer1[0].conv2.conv = nn.Conv3d(8, 8, 3, groups=2, bias=False).eval()
    assert conv is not None


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda model: model.train(), ValueError, "must be in evaluation mode"),
        (lambda model: model.head.train(), ValueError, "cls_head must be in evaluation mode"),
        (hooked, ValueError, "backbone.slow_path.layer2.1.conv2 .* got hooks .*accelerate"),
        (replaced, TypeError, "backbone.fast_path.layer1.0 must be of a class .* got Identity; .*accelerate"),
        (patched, ValueError, "cls_head .* got hooks or a replaced forward"),
        (grouped, ValueError, "layer1.0.conv2.conv must have one group"),
        (slowfast_ext.accelerate, TypeError, "restore"),
        (lambda model: model.head.to("meta"), ValueError, "must be on cpu, got meta"),
    ],
)
def test_a_model_that_the_engine_does_not_know_is_refused_by_name(change, kind, message):
    model = lively_model(small_config())
    change(model)
    with pytest.raises(kind, match=message):
        InferenceEngine(model)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dtype": torch.float64}, ValueError, "dtype must be"),
        ({"dtype": torch.float16}, RuntimeError, "on a CPU the engine computes in float32 or bfloat16"),
        ({"device": "meta"}, ValueError, r"model must be on meta, call model.to\('meta'\), got cpu"),
        ({"max_views": 0}, ValueError, "max_views must be a positive integer, None or 'auto', got 0"),
        ({"max_views": "many"}, ValueError, "max_views must be"),
        ({"cuda_graph": True}, ValueError, "cuda_graph must be False or 'auto' on cpu"),
        ({"cuda_graph": "yes"}, ValueError, "cuda_graph must be True, False or 'auto', got 'yes'"),
        ({"autotune": None}, ValueError, "autotune must be True, False or 'auto', got None"),
    ],
)
def test_a_wrong_option_is_named(model, options, kind, message):
    with pytest.raises(kind, match=message):
        InferenceEngine(model, **options)


@pytest.mark.parametrize(
    ("clip", "kind", "message"),
    [
        ([1], TypeError, "clip must be a tensor, got list"),
        (torch.zeros(1, 2, 3, 8, 64, 64), ValueError, "flatten the views into the batch"),
        (torch.zeros(1, 4, 8, 64, 64), ValueError, r"clip must be \(N, T, H, W, 3\) in uint8 or"),
        (torch.zeros(1, 3, 8, 64, 64, dtype=torch.uint8), ValueError, "clip must be .* in torch.uint8"),
        (torch.zeros(1, 3, 8, 64, 64, dtype=torch.int64), ValueError, "in floating point"),
        (torch.zeros(1, 3, 6, 64, 64), ValueError, "must be a multiple of 4 .* got 6"),
        (torch.zeros(1, 3, 0, 64, 64), ValueError, "must be a multiple of 4 .* got 0"),
        (torch.zeros(1, 3, 8, 0, 64), ValueError, "must have pixels"),
        (torch.zeros(1, 3, 8, 64, 64, device="meta"), ValueError, "must be on cpu or the CPU, got meta"),
    ],
)
def test_a_wrong_clip_is_refused_before_any_work(model, clip, kind, message):
    engine = InferenceEngine(model)
    with pytest.raises(kind, match=message):
        engine(clip)
    assert not engine._programs


def test_a_choice_is_that_of_this_code(model, clip, monkeypatch, tmp_path):
    for digest in ("one", "two"):
        monkeypatch.setattr(runtime, "_code_digest", lambda digest=digest: digest)
        InferenceEngine(model)(clip)
    machines = json.loads((tmp_path / "cache" / "autotune.json").read_text())["entries"]
    assert len(machines) == 2
    assert all(f"({digest})" in str(machines.keys()) for digest in ("one", "two"))


def test_a_map_smaller_than_the_sliding_window_is_refused():
    engine = InferenceEngine(lively_model(small_config(head_pooling="sliding")))
    with pytest.raises(ValueError, match="as large as the sliding window"):
        engine(torch.zeros(1, 3, 8, 64, 64))


def test_a_video_without_views_is_refused(model):
    with pytest.raises(ValueError, match="views must be at least one clip"):
        InferenceEngine(model).video(torch.zeros(0, 3, 8, 64, 64))
