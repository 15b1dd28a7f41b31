"""What the Python code does with tensors on a GPU, where there is none: with tensors that have all but numbers.

Kernels are chosen as on an H100, every operator sees the shapes, types, layouts and devices that it would see there,
and the results have those of its fake kernel. Needs a torch with CUDA.
"""

import sys
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slowfast_ext import InferenceEngine, accelerate, create_model, explain
from slowfast_ext.engine import fused
from slowfast_ext.engine.autotune import Tuner
from slowfast_ext.nn import training

pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),  # which is compared, not followed
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which other tests use"),
]

MODEL = "slowfast_r50_4x16x1_256e_kinetics400_rgb"
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block_optin=232448,
)


@pytest.fixture
def network(monkeypatch):
    """A network of the zoo on a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: H100)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments, **options: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for name, module in list(sys.modules.items()):
        if name.startswith("slowfast_ext"):
            for function in {"unavailable_reason", "_unavailable_reason"} & set(vars(module)):
                monkeypatch.setattr(module, function, lambda device=None: None)

    model = create_model(MODEL).to(memory_format=torch.channels_last_3d)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield _without_numbers(model, "cuda")


def _without_numbers(model, device):
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None:  # as a convolution's bias is
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    registry[name] = torch.nn.Parameter(fake) if registry is module._parameters else fake
    return model


class Calls(TorchDispatchMode):
    """Counts what is called, and the bytes that it moves if each operator reads and writes each of its tensors once."""

    def __enter__(self):
        self.count, self.bytes = Counter(), 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.count[name] += 1
        if not function.is_view:
            self.bytes += _moved(name, args, [*tree_leaves((args, kwargs)), *tree_leaves(result)])
        return result


def _moved(name, args, leaves):
    def size(*tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # Not the memory that is asked for, nor copies into a layout that cuDNN's results have and fake ones have not.
    if name.startswith(("empty", "new_empty")) or name in ("device", "clone"):
        return 0
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if name == "convolution_backward":  # two convolutions
        grad, x, weight = args[:3]
        needs_x, needs_weight, _ = args[-1]
        return (needs_x + needs_weight) * size(grad, x, weight)
    if name == "native_batch_norm":  # first the statistics
        tensors.append(args[0])
    elif name == "native_batch_norm_backward":
        tensors += args[:2]
    return size(*tensors)


def _autocast(dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_accelerated_network_runs_in_our_operators(network, dtype):
    model = accelerate(network.eval(), strict=True)
    clip = torch.empty(2, 3, 32, 256, 256, device="cuda")
    with torch.inference_mode(), _autocast(dtype), Calls() as calls:
        scores = model(clip)
    assert (scores.shape, scores.device.type) == ((2, 400), "cuda")
    expected = {"stem": 2, "lateral_fuse": 4, "pool_head": 1}
    if dtype == torch.float32:
        expected |= {"conv3d_bn_relu_pair": 8, "conv3d_bn_relu": 88}
    else:
        expected |= {"conv3d_bn_relu_pair": 5, "conv3d_bn_relu": 52, "fast_bottleneck": 13}
    assert {name: calls.count[name] for name in expected} == expected
    assert calls.count["convolution"] == calls.count["cat"] == calls.count["clone"] == 0
    assert all(row.called and row.served_by == "CUDA kernels" for row in explain(model).rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_training_step_gives_each_tensor_its_gradient(network, dtype, monkeypatch):
    """Block by block, as autograd would: its engine wants a real device."""
    blocks = []

    class Context:
        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

        def mark_non_differentiable(self, *tensors):
            pass

    def apply(structure, *inputs):
        context = Context()
        context.needs_input_grad = (False, *(tensor is not None and tensor.requires_grad for tensor in inputs))
        results = training._forward(context, structure, *inputs)
        blocks.append((context, results[0].requires_grad_(), inputs))
        return results

    monkeypatch.setattr(training._TrainedBlock, "apply", apply)
    model = accelerate(network.train(), mode="training")
    clip = torch.empty(8, 3, 32, 224, 224, device="cuda").to(memory_format=torch.channels_last_3d)
    with torch.no_grad(), Calls() as calls:
        with _autocast(dtype):
            scores = model(clip)
        assert (scores.shape, scores.device.type) == ((8, 400), "cuda")
        for context, result, inputs in reversed(blocks):
            _, *gradients = training._backward(context, torch.empty_like(result))
            for gradient, tensor in zip(gradients, inputs, strict=True):
                assert (gradient is not None) == (tensor is not None and tensor.requires_grad)
                if gradient is not None:
                    assert gradient.shape == tensor.shape
                    assert (gradient.dtype, gradient.device) == (tensor.dtype, tensor.device)
    assert len(blocks) == 34
    expected = {"batch_norm_reduce_gradient": 106, "batch_norm_apply_gradient": 106, "convolution_backward": 110}
    assert {name: calls.count[name] for name in expected} == expected
    assert calls.count["batch_norm_statistics"] + calls.count["conv3d_statistics"] == 106
    assert calls.count["conv3d_statistics"] > 20
    added = 32 - calls.count["add_"]  # gradients of shortcuts, in the pass of a convolution
    assert added > 10
    assert calls.count["cat"] == 1  # the head's
    if dtype == torch.bfloat16:
        assert calls.bytes / 2**30 == pytest.approx(24.9, abs=0.05)


def test_a_training_step_of_plain_blocks_moves_more():
    """On a CPU, where autograd's engine takes such tensors, the operators are the same."""
    model = create_model(MODEL).train().to(memory_format=torch.channels_last_3d)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _without_numbers(model, "cpu")
        clip = torch.empty(8, 3, 32, 224, 224).to(memory_format=torch.channels_last_3d)
        with Calls() as calls:
            with torch.autocast("cpu", torch.bfloat16):
                scores = model(clip)
            scores.sum().backward()
    assert calls.bytes / 2**30 == pytest.approx(32.1, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_candidate_of_the_engine_fits_its_layer(network, dtype, monkeypatch):
    tried = Counter()

    def choose(self, key, candidates, reference, limit):
        expected = reference()
        for candidate in candidates:
            if not candidate.name.startswith("cudnn"):  # these have no fake kernel
                result = candidate.run()
                assert (result.shape, result.device) == (expected.shape, expected.device), (key, candidate.name)
            tried[candidate.name.partition(" ")[0]] += 1
        return candidates[0].name, "not timed"

    monkeypatch.setattr(Tuner, "choose", choose)
    monkeypatch.setattr(fused, "measure_ceilings", lambda device, dtype: None)
    for name in ("Stream", "Event", "CUDAGraph", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "device", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: nullcontext())
    engine = InferenceEngine(network.eval(), dtype=dtype)
    for clip in (
        torch.empty(1, 3, 32, 256, 256, device="cuda"),
        torch.empty(2, 32, 256, 256, 3, dtype=torch.uint8, device="cuda"),
    ):
        scores = engine(clip)
        assert (scores.shape, scores.dtype, scores.device.type) == ((len(clip), 400), torch.float32, "cuda")
    assert tried.keys() == {
        "ops.conv3d_bn_relu",
        "ops.conv3d_bn_relu_pair",
        "torch",
        "GEMM",
        "cudnn_convolution_relu",
        "cudnn_convolution_add_relu",
    }
