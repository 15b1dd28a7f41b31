"""Blocks in training against the plain blocks: results, gradients, running statistics, and what is kept for them."""

import copy
import importlib

import pytest
import torch
from fused_cases import CASES, LAYOUTS, build, inputs, lively
from kept import KeptTensors
from small_networks import small_config
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from training_steps import EXACT, assert_same_buffers, assert_same_gradients, assert_same_scaled_steps, run

from slowfast_ext import accelerate, explain, ops, restore
from slowfast_ext.models import (
    BasicBlock3d,
    Bottleneck3d,
    ConvBNReLU3d,
    Lateral,
    Stem,
    SubBatchNorm3d,
    build_model,
)
from slowfast_ext.models.batch_norm import SyncBatchNorm3d
from slowfast_ext.nn import training_layer
from slowfast_ext.nn.training import Step, Structure

STEM = type(CASES["stem"])(lambda: Stem(6, 5), ((2, 3, 5, 15, 13),))  # fewer frames: see the test of oneDNN below
BLOCKS = {name: case for name, case in {**CASES, "pooled_stem": STEM}.items() if "without_norm" not in name}
blocks = pytest.mark.parametrize("case", BLOCKS.values(), ids=BLOCKS.keys())
bottleneck = CASES["bottleneck_downsample"]


def _pair(case, dtype=torch.float64):
    """A plain block in training and its twin."""
    plain = build(case, dtype).train()
    return plain, accelerate(copy.deepcopy(plain), mode="training", strict=True)


def _copies(tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _assert_same_gradients(twin, plain, mine=(), theirs=()):
    pairs = ((twin, mine), (plain, theirs))
    assert_same_gradients(*([tensor.grad for tensor in (*model.parameters(), *inputs)] for model, inputs in pairs))


def _assert_same(twin, plain, mine, theirs, results):
    assert_close(*results, **EXACT)
    _assert_same_gradients(twin, plain, mine, theirs)
    assert_same_buffers(twin, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@blocks
def test_a_step_of_training_is_the_plain_blocks(case, layout):
    plain, twin = _pair(case)
    x = inputs(case, torch.float64, layout=layout)
    theirs, mine = _copies(x), [tensor.detach().requires_grad_() for tensor in x]
    results = run(twin, mine), run(plain, theirs)
    assert twin.last_forward == "fused"
    assert results[0].is_contiguous(memory_format=torch.channels_last_3d) or results[0].numel() == 0
    _assert_same(twin, plain, mine, theirs, results)


@blocks
@pytest.mark.parametrize("adds", [False, True], ids=["", "adds in a convolution"])
def test_what_a_gpu_runs_gives_the_same_in_plain_pytorch(case, adds, monkeypatch):
    """The passes of batch norm one by one, cuDNN's call for the convolutions, signs computed again."""
    monkeypatch.setattr(training_layer, "_on_cpu", lambda tensor: False)
    if adds:
        monkeypatch.setattr(training_layer, "_addition_reason", lambda *geometry: None)
    batch_norm_relu = importlib.import_module("slowfast_ext.ops.batch_norm_relu")
    monkeypatch.setattr(batch_norm_relu, "_torch_serves", lambda x, splits: False)
    plain, twin = _pair(case)
    x = inputs(case, torch.float64)
    theirs, mine = _copies(x), _copies(x)
    results = run(twin, mine), run(plain, theirs)
    assert twin.last_forward == "fused"
    _assert_same(twin, plain, mine, theirs, results)


@pytest.mark.parametrize(
    ("kernel", "padding", "stride", "in_one_pass"),
    [
        ((1, 1, 1), (0, 0, 0), (1, 1, 1), True),
        ((3, 1, 1), (1, 0, 0), (1, 1, 1), True),
        ((3, 3, 2), (0, 2, 1), (1, 1, 1), True),
        ((1, 3, 3), (0, 1, 1), (1, 2, 2), False),
        ((3, 1, 1), (3, 0, 0), (1, 1, 1), False),  # part of the result is of padding alone
    ],
    ids=str,
)
def test_the_gradient_of_the_input_is_added_to_another(kernel, padding, stride, in_one_pass, monkeypatch):
    monkeypatch.setattr(training_layer, "_on_cpu", lambda tensor: False)
    monkeypatch.setattr(training_layer, "_addition_reason", lambda *geometry: None)
    conv = nn.Conv3d(6, 4, kernel, stride, padding, dtype=torch.float64)
    x = torch.randn(2, 6, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    y = conv(x)
    grad, onto = torch.randn_like(y), torch.randn_like(x)
    expected = torch.autograd.grad(y, (x, conv.weight, conv.bias), grad)
    layer = training_layer.Layer(
        Step(stride, padding, None, False), (conv.weight, conv.bias, *[None] * 4), torch.float64
    )
    with torch.no_grad():
        assert layer._adds_gradient(grad, x) == in_one_pass
        for needs in ([True] * 3, [True, False, False], [False, True, True]):
            found = layer.gradients(grad, x, needs, onto.clone())
            for actual, wanted, needed, added in zip(found, expected, needs, (onto, 0, 0), strict=True):
                assert (actual is not None) == needed
                if needed:
                    assert_close(actual, wanted + added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@blocks
def test_errors_are_no_larger_than_the_plain_blocks(case, dtype):
    """Against float64, of the plain block in the layout that the twin computes in."""
    exact = build(case, torch.float64).train()
    plain = copy.deepcopy(exact).float()
    twin = accelerate(copy.deepcopy(plain), mode="training")
    x = [tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in inputs(case)]
    errors = []
    run(exact, [tensor.double() for tensor in x])
    for module in (plain, twin):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = module(*x)
        run(y.float, [])
        pairs = zip(module.parameters(), exact.parameters(), strict=True)
        errors.append(torch.cat([(ours.grad.double() - theirs.grad).flatten() for ours, theirs in pairs]))
    assert twin.last_forward == "fused"
    # An epsilon where both are exact; the factor for the luck of single roundings in tensors of some hundred elements.
    assert errors[1].norm() <= 2 * errors[0].norm() + 1e-9


@pytest.mark.parametrize(
    ("kernel", "stride"), [((5, 7, 7), (1, 2, 2)), ((3, 3, 3), (1, 1, 1)), ((3, 1, 1), (1, 1, 1))], ids=str
)
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_the_gradient_of_a_kernel_longer_than_the_clip_is_finite_on_a_cpu(kernel, stride, frames):
    """Torch's own is not, in bfloat16: oneDNN takes what is in fresh memory for frames."""
    exact = lively(ConvBNReLU3d(8, 16, kernel, stride)).double().train()
    twin = accelerate(copy.deepcopy(exact).float(), mode="training")
    x = torch.randn(2, 8, frames, 9, 9).requires_grad_()
    reference = x.detach().double().requires_grad_()
    run(exact, [reference])
    for _ in range(3):
        for size in (10**4, 10**5, 10**6):
            torch.full((size,), float("nan"))  # is freed at once
        twin.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = twin(x)
        run(y.float, [])
        for ours, theirs in ((twin.conv.weight.grad, exact.conv.weight.grad), (x.grad, reference.grad)):
            assert (ours - theirs).norm() < 0.1 * theirs.norm()  # rounded activations shift some of the ReLUs


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv3d(5, 6, 1, (2, 1, 1)),
        nn.Conv3d(5, 6, 1, (1, 2, 3), (0, 1, 1), bias=False),
        nn.Conv3d(5, 6, 1, padding=(1, 0, 0)),
        nn.Conv3d(5, 6, (3, 1, 1), (1, 2, 2), (1, 0, 0)),
        nn.Conv3d(5, 6, (3, 1, 1), (2, 1, 1), (1, 1, 0), bias=False),
        nn.Conv3d(5, 6, (2, 3, 1), 2, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no weight"])
def test_convolutions_of_any_geometry_and_norms_without_weights_are_differentiated(conv, affine):
    plain = ConvBNReLU3d(5, 6, (1, 1, 1))
    plain.conv, plain.bn = copy.deepcopy(conv), nn.BatchNorm3d(6, affine=affine)
    plain = plain.double().train()
    twin = accelerate(copy.deepcopy(plain), mode="training", strict=True)
    x = torch.randn(2, 5, 4, 7, 6, dtype=torch.float64)
    mine, theirs = _copies([x]), _copies([x])
    results = run(twin, mine), run(plain, theirs)
    assert twin.last_forward == "fused"
    _assert_same(twin, plain, mine, theirs, results)


def _evaluate(module, *names):
    for name in names:
        module.get_submodule(name).eval()


@pytest.mark.parametrize(
    "change",
    [
        lambda block: _evaluate(block, "conv1.bn", "conv2.bn", "conv3.bn", "downsample.bn"),
        lambda block: _evaluate(block, "conv2.bn"),
        lambda block: block.eval(),
        lambda block: block.conv2.conv.requires_grad_(False),
        lambda block: block.conv1.requires_grad_(False),
        lambda block: [block.conv1.requires_grad_(False), block.conv2.requires_grad_(False)],
        lambda block: [setattr(part.bn, "momentum", None) for part in (block.conv1, block.conv3)],
        lambda block: block.downsample.requires_grad_(False),
    ],
    ids=["all frozen", "one frozen", "eval", "weight", "first", "first two", "cumulative average", "shortcut"],
)
@pytest.mark.parametrize("input_needs_gradient", [True, False], ids=["x", "no x"])
def test_frozen_parts_are_respected(change, input_needs_gradient):
    plain = build(bottleneck, torch.float64).train()
    change(plain)
    twin = accelerate(copy.deepcopy(plain), mode="training")
    (x,) = inputs(bottleneck, torch.float64)
    mine, theirs = ([x.clone().requires_grad_(input_needs_gradient)] for _ in range(2))
    for _ in range(2):
        results = run(twin, mine), run(plain, theirs)
    assert twin.last_forward == "fused"
    _assert_same(twin, plain, mine, theirs, results)


def test_statistics_may_come_from_the_convolution(monkeypatch):
    monkeypatch.setattr(training_layer, "_statistics_reason", lambda *geometry: None)
    calls = []
    conv3d_statistics = ops.conv3d_statistics
    monkeypatch.setattr(ops, "conv3d_statistics", lambda *a, **k: calls.append(a) or conv3d_statistics(*a, **k))
    plain = build(bottleneck, torch.float64).train()
    norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm3d)]
    for norm in norms:
        norm.eps = 0.5
    twin = accelerate(copy.deepcopy(plain), mode="training", strict=True)
    x = inputs(bottleneck, torch.float64)
    mine, theirs = _copies(x), _copies(x)
    _assert_same(twin, plain, mine, theirs, (run(twin, mine), run(plain, theirs)))
    assert len(calls) == len(norms)


def test_statistics_of_parts_of_the_batch_are_supported():
    plain = build(CASES["bottleneck"], torch.float64)
    for part in (plain.conv1, plain.conv2, plain.conv3):
        part.bn = SubBatchNorm3d.from_batch_norm(part.bn, 2).double()
    plain.train()
    twin = accelerate(copy.deepcopy(plain), mode="training", strict=True)
    x = torch.randn(4, 16, 2, 5, 7, dtype=torch.float64)
    mine, theirs = _copies([x]), _copies([x])
    results = run(twin, mine), run(plain, theirs)
    assert twin.last_forward == "fused"
    _assert_same(twin, plain, mine, theirs, results)


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, SyncBatchNorm3d])
def test_synchronised_batch_norm_of_one_process_is_batch_norm(norm):
    plain = build(CASES["bottleneck"], torch.float64).train()
    block = copy.deepcopy(plain)
    for part in (block.conv1, block.conv2, block.conv3):
        part.bn.__class__ = norm
    twin = accelerate(block, mode="training", strict=True)
    (x,) = inputs(CASES["bottleneck"], torch.float64)
    mine, theirs = _copies([x]), _copies([x])
    _assert_same(twin, plain, mine, theirs, (run(twin, mine), run(plain, theirs)))


def test_a_bottleneck_keeps_one_tensor_for_each_convolution():
    block = accelerate(Bottleneck3d(64, 16).train(), mode="training")
    x = torch.randn(2, 64, 4, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    with KeptTensors([block]) as kept:
        y = block(x.requires_grad_())
    pixels = 2 * 4 * 8 * 8
    statistics = 2 * (16 + 16 + 64)
    # x and y, which the blocks before and behind keep too, and the results of two convolutions; that of the third not
    assert kept.bytes // 4 == pixels * (64 + 64 + 16 + 16) + statistics
    assert y.numel() == pixels * 64


def test_a_network_keeps_less_than_half():
    plain = build_model(small_config(dropout=0.0)).train()
    twin = accelerate(copy.deepcopy(plain), mode="training")
    clip = torch.randn(2, 3, 8, 64, 64).contiguous(memory_format=torch.channels_last_3d)
    kept = []
    for model in (plain, twin):
        with KeptTensors([model]) as keeping:
            model(clip)
        kept.append(keeping.bytes - 4 * clip.numel())
    assert kept[1] < 0.5 * kept[0]


def test_a_shortcut_and_a_last_convolution_are_computed_again_where_that_is_cheap():
    step = Step((1, 1, 1), (0, 0, 0), None, False)
    structure = Structure((step,) * 3, residual=True, shortcut=step)
    narrow, wide, spatial = torch.ones(64, 16, 1, 1, 1), torch.ones(512, 256, 1, 1, 1), torch.ones(64, 16, 1, 3, 3)
    assert [structure.is_recomputed(step, narrow) for step in range(4)] == [False, False, True, True]
    assert not structure.is_recomputed(2, wide)  # on a CPU
    assert not structure.is_recomputed(2, spatial)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lateral_norm", [True, False])
@pytest.mark.parametrize("depth", [18, 50])
def test_a_network_trains_as_the_plain_one_without_a_concatenation(depth, lateral_norm):
    plain = lively(build_model(small_config(depth, depth, lateral_norm=lateral_norm, dropout=0.0)).double().train())
    twin = accelerate(copy.deepcopy(plain), mode="training")
    clip = torch.randn(2, 3, 8, 17, 20, dtype=torch.float64)
    mine, theirs = _copies([clip]), _copies([clip])
    with _Operators() as operators:
        result = run(twin, mine)
    report = explain(twin)
    assert all(row.called and row.reason is None for row in report.rows if row.name != "cls_head"), report
    assert operators.names.count("aten::cat") == 1  # in the head, of two vectors
    _assert_same(twin, plain, mine, theirs, (result, run(plain, theirs)))


def test_a_hooked_lateral_or_one_behind_a_hooked_block_concatenates_and_the_hook_runs():
    plain = build_model(small_config(dropout=0.0)).double().train()
    twin = accelerate(copy.deepcopy(plain), mode="training")
    shapes = []
    for module in (twin.backbone.slow_path.layer1[-1], twin.backbone.slow_path.layer2_lateral):
        module.register_forward_hook(lambda module, x, y: shapes.append((x[0].shape[1], y.shape[1])))
    clip = torch.randn(1, 3, 8, 32, 32, dtype=torch.float64)
    assert_close(run(twin, [clip]), run(plain, [clip]), **EXACT)
    assert shapes == [(32, 32), (64, 96)]  # the block without the channels of its lateral connection
    _assert_same_gradients(twin, plain)


def test_a_hook_inside_a_block_makes_it_train_plainly_with_a_reason():
    plain, twin = _pair(bottleneck)
    calls = []
    twin.conv2.register_forward_hook(lambda *_: calls.append(1))
    (x,) = inputs(bottleneck, torch.float64)
    results = run(twin, [x]), run(plain, [x])
    assert calls
    assert "hooks" in twin.last_forward
    _assert_same_gradients(twin, plain)
    assert_close(*results, **EXACT)


@pytest.mark.parametrize("name", ["bottleneck_downsample", "pooled_stem"])
def test_a_backward_pass_under_autocast_is_that_outside_of_it(name):
    _, twin = _pair(BLOCKS[name], torch.float32)
    x = inputs(BLOCKS[name])
    gradients = []
    for inside in (False, True):
        twin.zero_grad()
        loss = twin(*x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        gradients.append([parameter.grad for parameter in twin.parameters()])
    assert_close(*gradients, rtol=0, atol=0)


def test_a_module_may_be_used_twice_and_gradients_add_up():
    case = CASES["bottleneck"]
    plain, twin = _pair(case)
    (x,) = inputs(case, torch.float64)
    for _ in range(2):
        for module in (twin, plain):
            run(lambda x, module=module: module(module(x)), [x])
    _assert_same_gradients(twin, plain)
    assert_close(twin.conv1.bn.running_var, plain.conv1.bn.running_var, **EXACT)


def test_checkpointing_recomputes_the_same():
    plain, twin = _pair(bottleneck)
    (x,) = inputs(bottleneck, torch.float64)
    for module in (twin, plain):
        run(lambda x, module=module: checkpoint(module, x, use_reentrant=False), [x.requires_grad_()])
    _assert_same_gradients(twin, plain)
    # Plain blocks move their statistics again when they are recomputed. Torch leaves the recomputation of the last one
    # at the last tensor that it needs, before a fused block has moved its own.
    assert [int(block.conv3.bn.num_batches_tracked) for block in (twin, plain)] == [1, 2]


def test_statistics_move_without_gradients_too():
    plain, twin = _pair(bottleneck)
    x = inputs(bottleneck, torch.float64)
    with torch.no_grad():
        results = twin(*x), plain(*x)
    assert twin.last_forward == "fused"
    assert_close(*results, **EXACT)
    assert_close(twin.conv2.bn.running_var, plain.conv2.bn.running_var, **EXACT)


def test_evaluation_of_an_accelerated_network_in_training_is_folded():
    plain, twin = _pair(bottleneck)
    x = inputs(bottleneck, torch.float64)
    for module in (plain, twin):
        run(module, x)
        with torch.no_grad():
            module.conv1.conv.weight.mul_(1.1)
    with torch.inference_mode():
        assert_close(twin.eval()(*x), plain.eval()(*x), **EXACT)


def test_a_step_compiles_in_one_graph():
    plain = build_model(small_config(18, 18, dropout=0.0)).double().train()
    twin = accelerate(copy.deepcopy(plain), mode="training")
    clip = torch.randn(1, 3, 8, 32, 32, dtype=torch.float64)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = run(compiled, [clip]), run(plain, [clip])
    _assert_same(twin, plain, [], [], results)


def test_a_gradient_scaler_updates_as_with_plain_blocks_and_skips_what_overflows():
    plain, twin = _pair(bottleneck, torch.float32)
    (x,) = inputs(bottleneck)
    assert_same_scaled_steps(plain, twin, x)


def test_the_mode_can_be_changed_and_undone():
    block = Bottleneck3d(8, 2).train()
    twin = accelerate(block, mode="training")
    x = torch.randn(2, 8, 2, 4, 4)
    twin(x)
    assert twin.last_forward == "fused"
    accelerate(twin)(x)
    assert twin.last_forward == "it is in training mode"
    accelerate(twin, mode="training")(x)
    assert twin.last_forward == "fused"
    assert restore(twin) is block
    assert "trains" not in vars(block)


def test_a_block_without_batch_norm_trains_plainly():
    for block, shapes in (
        (ConvBNReLU3d(4, 4, (1, 1, 1), norm=False), [(1, 4, 2, 3, 3)]),
        (Lateral(2, 3, 2, False), [(1, 4, 1, 3, 3), (1, 2, 2, 3, 3)]),
    ):
        twin = accelerate(block.train(), mode="training")
        twin(*(torch.randn(shape) for shape in shapes)).sum().backward()
        assert twin.last_forward == "it has no batch norm"


def test_a_second_derivative_is_refused():
    _, twin = _pair(CASES["basic"])
    (x,) = inputs(CASES["basic"], torch.float64)
    (grad,) = torch.autograd.grad(twin(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_one_element_a_channel_is_an_error_as_it_is_in_torch():
    twin = accelerate(BasicBlock3d(4, 4).train(), mode="training")
    with pytest.raises(ValueError, match="more than one element a channel"):
        twin(torch.randn(1, 4, 1, 1, 1))
