"""The engine where it has its arena on a GPU, two streams and a CUDA graph."""

import copy

import pytest
import torch
from small_networks import lively_model, small_config
from test_engine import CONFIGS, error, in_threads
from tolerances import UNIT_ROUNDOFF

from slowfast_ext import InferenceEngine
from slowfast_ext.data import normalize

pytestmark = pytest.mark.cuda
# Of logits, in roundings of one number: random networks amplify them by ten.
LIMITS = {dtype: 100 * UNIT_ROUNDOFF[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lively_model(small_config()).cuda()


def exact(model, clip):
    with torch.inference_mode():
        return copy.deepcopy(model).double()(clip.double()).float()


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_are_those_of_the_plain_model(fields, dtype, cuda_graph):
    model = lively_model(small_config(**fields)).cuda()
    engine = InferenceEngine(model, dtype=dtype, cuda_graph=cuda_graph, autotune=False)
    for n in (1, 3):
        clip = torch.randn(n, 3, 16, 64, 79, device="cuda")
        raw = torch.randint(0, 256, (n, 16, 64, 79, 3), dtype=torch.uint8)  # on the CPU
        normalised = normalize(raw.cuda(), *vars(model.config.normalization).values())
        for _ in range(2):  # the second time the arena holds another clip's numbers
            assert error(engine(clip), exact(model, clip)) < LIMITS[dtype]
            assert error(engine(raw), exact(model, normalised)) < LIMITS[dtype]
    assert ("CUDA graph" in engine.plan.title) == cuda_graph


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_tuned_kernels_give_the_same_logits(model, cuda_graph):
    clip = torch.randn(2, 3, 8, 64, 64, device="cuda")
    engine = InferenceEngine(model, dtype=torch.bfloat16, cuda_graph=cuda_graph)
    assert error(engine(clip), exact(model, clip)) < LIMITS[torch.bfloat16]
    assert any("tuned" in step.why for step in engine.plan.steps)


def test_a_forward_pass_allocates_its_result_alone(model):
    clip = torch.randn(1, 3, 8, 64, 64, device="cuda")
    engine = InferenceEngine(model, dtype=torch.bfloat16, autotune=False)
    engine(clip)

    def allocations():
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    before = allocations()
    result = engine(clip)
    assert allocations() - before == 1
    assert result.shape == (1, 5)


def test_calls_on_other_streams_and_from_threads_wait_for_each_other(model):
    engine = InferenceEngine(model, dtype=torch.bfloat16, autotune=False)
    clips = [torch.randn(1, 3, 8, 64, 64, device="cuda") for _ in range(6)]
    expected = [engine(clip) for clip in clips]
    torch.cuda.synchronize()

    def on_a_stream(clip):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            result = engine(clip)
        stream.synchronize()
        return result

    for result, logits in zip(in_threads(*(lambda c=c: on_a_stream(c) for c in clips)), expected, strict=True):
        assert torch.equal(result, logits)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_each_gpu_has_an_engine_of_its_own(model):
    engines = [InferenceEngine(copy.deepcopy(model).to(f"cuda:{index}"), autotune=False) for index in range(2)]
    clip = torch.randn(1, 3, 8, 64, 64)
    results = in_threads(*(lambda engine=engine: engine(clip) for engine in engines))
    assert [result.device.index for result in results] == [0, 1]
    for result in results:
        assert error(result.cpu(), exact(model, clip.cuda()).cpu()) < LIMITS[torch.float32]


def test_views_of_a_video_are_as_many_at_a_time_as_fit(model, monkeypatch):
    views = torch.randint(0, 256, (6, 8, 64, 64, 3), dtype=torch.uint8, device="cuda")
    engine = InferenceEngine(model, autotune=False)
    expected = engine(views).softmax(1).mean(0)
    assert engine._fitting_views(views[:1], 6) == 6
    torch.testing.assert_close(engine.video(views), expected)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 2**30))
    assert engine._fitting_views(views[:1], 6) == 1
    torch.testing.assert_close(engine.video(views), expected)
