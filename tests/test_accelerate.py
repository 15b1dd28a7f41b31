"""accelerate, explain and restore on whole models."""

import copy
import warnings

import pytest
import torch
from fused_cases import block_tolerance, lively
from small_networks import lively_model, small_config
from torch import nn
from torch.testing import assert_close

import slowfast_ext
from slowfast_ext import accelerate, explain, models, restore
from slowfast_ext.models import Bottleneck3d, ConvBNReLU3d, Lateral, ResNet3dPathway, Stem
from slowfast_ext.nn import (
    FusedBlock,
    FusedBottleneck3d,
    FusedConvBNReLU3d,
    FusedHead,
    FusedLateral,
    FusedSlowFastBackbone,
    FusedStem,
)

# The zoo by what is built; configurations also differ in training, sampling and classes.
NETWORKS = {}
for name in slowfast_ext.list_models():
    config = models.get_config(name)
    NETWORKS.setdefault((config.slow, config.fast, config.speed_ratio, config.lateral_norm), config)


def small_model(**fields):
    return lively_model(small_config(**fields))


def small_clip(dtype=torch.float32):
    return torch.randn(1, 3, 8, 32, 32, dtype=dtype)


def twins(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedBlock)}


@pytest.mark.parametrize(
    "config",
    NETWORKS.values(),
    ids=lambda config: f"{config.slow.depth}_{config.fast.depth}_ratio_{config.speed_ratio}_norm_{config.lateral_norm}",
)
def test_every_network_of_the_zoo_gives_the_same_scores(config):
    model = lively_model(config)
    size = 16 if config.slow.depth > 50 else 32
    clip = torch.randn(1, 3, config.resample_rate, size, size)
    with torch.inference_mode():
        expected = model(clip)
        actual = accelerate(model, strict=True)(clip)
    assert_close(actual, expected, **block_tolerance(model, torch.float32, expected))
    assert not explain(model).kept
    assert all(row.called and row.reason is None for row in explain(model).rows)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_small_network_gives_the_same_scores_in_other_dtypes(depth, dtype):
    model = small_model(slow_depth=depth, fast_depth=depth, lateral_norm=True).to(dtype)
    clip = small_clip(dtype)
    with torch.inference_mode():
        expected = model(clip)
        actual = accelerate(model, strict=True)(clip)
    assert_close(actual, expected, **block_tolerance(model, dtype, expected))


def test_the_outermost_blocks_are_replaced():
    model = accelerate(small_model(), strict=True)
    classes = [type(module) for module in twins(model).values()]
    assert classes.count(FusedBottleneck3d) == 32
    assert classes.count(FusedStem) == 2
    assert classes.count(FusedLateral) == 4
    assert classes.count(FusedConvBNReLU3d) == 0  # those inside the blocks are theirs
    assert classes.count(FusedSlowFastBackbone) == classes.count(FusedHead) == 1
    assert len(classes) == 40


def test_keys_parameters_and_buffers_are_untouched():
    model = small_model()
    before = {name: (id(value), value.data_ptr()) for name, value in model.state_dict(keep_vars=True).items()}
    order = list(before)
    accelerate(model)
    after = {name: (id(value), value.data_ptr()) for name, value in model.state_dict(keep_vars=True).items()}
    assert list(after) == order
    assert after == before


def test_children_keep_their_places():
    model = small_model()
    before = [name for name, _ in model.named_modules()]
    assert [name for name, _ in accelerate(model).named_modules()] == before


def test_accelerating_twice_changes_nothing():
    model = accelerate(small_model())
    before = twins(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accelerate(model, strict=True) is model
    assert twins(model) == before


def test_a_model_that_is_itself_a_block_is_returned_as_its_twin():
    block = lively(Bottleneck3d(8, 4)).eval()
    twin = accelerate(block)
    assert type(twin) is FusedBottleneck3d
    assert str(explain(twin)).startswith("(the model)  Bottleneck3d  FusedBottleneck3d")
    assert restore(twin) is block


def test_a_module_used_in_two_places_has_one_twin():
    block = Bottleneck3d(16, 4)
    model = nn.ModuleDict({"a": nn.Sequential(block), "b": nn.Sequential(nn.ReLU(), block), "c": block})
    accelerate(model)
    assert type(model["a"][0]) is FusedBottleneck3d
    assert model["a"][0] is model["b"][1] is model["c"]
    restore(model)
    assert model["a"][0] is model["b"][1] is model["c"] is block


def test_restore_puts_back_the_very_modules_with_their_hooks_and_mode():
    model = small_model()
    modules = dict(model.named_modules())
    state = copy.deepcopy({name: {**module.__dict__} for name, module in modules.items()})
    seen = []
    modules["backbone.slow_path.layer1.0"].register_forward_hook(lambda *arguments: seen.append("early"))
    accelerate(model)
    late = model.backbone.slow_path.layer1[0].register_forward_hook(lambda *arguments: seen.append("late"))
    with torch.inference_mode():
        model(small_clip())
    assert seen == ["early", "late"]
    model.train()
    assert restore(model) is model
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in model.modules())
    seen.clear()
    model.eval()(small_clip())
    assert seen == ["early", "late"]
    late.remove()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == state[name].keys(), name


def test_restore_keeps_what_was_done_to_the_twins():
    model = accelerate(small_model())
    stem = model.backbone.fast_path.conv1
    stem.relu = False
    stem.register_full_backward_hook(lambda *arguments: None)
    stem.note = "kept"
    stem.bn = None
    restore(model)
    plain = model.backbone.fast_path.conv1
    assert type(plain) is Stem
    assert (plain.relu, plain.note, plain.bn, plain._is_full_backward_hook) == (False, "kept", None, True)
    assert not set(plain.__dict__) & {"plain", "folded", "last_forward", "layer_by_layer"}


def test_restore_of_a_plain_model_changes_nothing():
    model = small_model()
    modules = dict(model.named_modules())
    assert restore(model) is model
    assert dict(model.named_modules()) == modules


def test_training_an_accelerated_model_equals_training_the_plain_one():
    plain = small_model(slow_depth=18, fast_depth=18, dropout=0.0).train()
    model = accelerate(copy.deepcopy(plain).eval())
    clip = small_clip()
    with torch.inference_mode():
        model(clip)
    model.train()
    clips = torch.cat([clip, clip.flip(2)])
    for network in (plain, model):
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        network(clips).square().mean().backward()
        optimizer.step()
    for (name, expected), actual in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert_close(actual, expected, rtol=0, atol=0, msg=name)
    plain.eval()
    model.eval()
    with torch.inference_mode():
        expected = plain(clip)
        assert_close(model(clip), expected, **block_tolerance(plain, torch.float32, expected))


def test_train_and_eval_reach_the_children_of_a_twin():
    model = accelerate(small_model())
    for mode in (True, False):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}


def test_where_chooses_by_name_and_module():
    model = small_model()
    asked = []

    def where(name, module):
        asked.append((name, module))
        return isinstance(module, Lateral) or name.startswith("backbone.fast_path.layer1")

    plain = dict(model.named_modules())
    accelerate(model, where=where, strict=True)
    assert all(plain[name] is module for name, module in asked)
    laterals = {"backbone.slow_path." + name for name in ResNet3dPathway.LATERAL_NAMES}
    assert set(twins(model)) == laterals | {f"backbone.fast_path.layer1.{block}" for block in range(3)}
    report = explain(model)
    assert len(report.rows) == 40
    assert {row.reason for row in report.kept} == {"not accelerated: where left it out, or accelerate() was not called"}


def test_where_can_choose_inner_blocks():
    model = accelerate(small_model(), where=lambda name, module: type(module) is ConvBNReLU3d)
    stage = model.backbone.slow_path.layer1
    assert type(stage[0]) is Bottleneck3d
    assert type(stage[0].conv1) is FusedConvBNReLU3d
    rows = {row.name: row for row in explain(model).rows}
    assert rows["backbone.slow_path.layer1.0"].outcome == "kept: conv1 is fused by itself"
    assert rows["backbone.slow_path.layer1.0.conv1"].twin == "FusedConvBNReLU3d"


def with_an_obstacle():
    """A model in which one convolution has a hook, and one bottleneck is of a class of its own."""

    class OwnBottleneck(Bottleneck3d):
        pass

    model = small_model()
    model.backbone.slow_path.layer2[1].conv2.conv.register_forward_hook(lambda *arguments: None)
    model.backbone.slow_path.layer3[1].__class__ = OwnBottleneck
    return model


def test_kept_blocks_are_reported_in_one_warning_and_searched_for_inner_blocks():
    model = with_an_obstacle()
    with pytest.warns(UserWarning, match=r"3 of 46 candidates are kept, most often \(1\) because") as caught:
        accelerate(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    kept = {row.name: row.reason for row in explain(model).kept}
    assert kept == {
        "backbone.slow_path.layer2.1": "conv2.conv has hooks, which a fused block cannot run",
        "backbone.slow_path.layer2.1.conv2": "conv has hooks, which a fused block cannot run",
        "backbone.slow_path.layer3.1": "FusedBottleneck3d does not know the class OwnBottleneck",
    }
    assert {"backbone.slow_path.layer2.1.conv1", "backbone.slow_path.layer3.1.conv2"} <= set(twins(model))


def test_strict_raises_all_reasons_and_replaces_nothing():
    model = with_an_obstacle()
    with pytest.raises(RuntimeError, match="with strict every candidate must be fused, got 3 that cannot") as error:
        accelerate(model, strict=True)
    message = str(error.value)
    assert "backbone.slow_path.layer2.1: conv2.conv has hooks, which a fused block cannot run" in message
    assert "backbone.slow_path.layer3.1: FusedBottleneck3d does not know the class OwnBottleneck" in message
    assert not twins(model)


def test_strict_does_not_count_what_where_leaves_out():
    obstacles = ("backbone.slow_path.layer2.1", "backbone.slow_path.layer3.1")
    model = accelerate(with_an_obstacle(), where=lambda name, module: not name.startswith(obstacles), strict=True)
    assert len(twins(model)) == 38


def test_a_model_without_candidates_is_said_to_have_none():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    none = "the model has no 3-D convolution, and no block of slowfast_ext.models"
    with pytest.warns(UserWarning, match=f"accelerate: {none}"):
        assert accelerate(model) is model
    with pytest.raises(RuntimeError, match=f"got none: {none}"):
        accelerate(model, strict=True)
    assert str(explain(model)) == f"no candidates: {none}"


def test_explain_tells_what_the_last_forward_did():
    model = small_model()
    assert "kept: not accelerated" in str(explain(model))
    assert str(explain(model)).endswith("0 of 40 candidates fused")
    accelerate(model)
    text = str(explain(model))
    assert "FusedLateral, no forward yet" in text
    assert "40 of 40 candidates fused" in text
    assert text.endswith("operators run in PyTorch: the kernels are CUDA-only, the tensors are on cpu")
    model(small_clip())
    assert "FusedLateral, last forward plain: gradients of its parameters are recorded" in str(explain(model))
    with torch.inference_mode():
        model(small_clip())
    assert "no forward yet" not in str(explain(model))
    assert "last forward plain" not in str(explain(model))
    model.train()(torch.cat([small_clip(), small_clip()]))
    assert str(explain(model)).count("last forward plain: it is in training mode") == 40


def test_a_saved_state_loads_into_a_plain_model(tmp_path):
    model = accelerate(small_model(slow_depth=18, fast_depth=18))
    torch.save(model.state_dict(), tmp_path / "state.pth")
    other = small_model(slow_depth=18, fast_depth=18)
    other.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    clip = small_clip()
    with torch.inference_mode():
        expected = other(clip)
        assert_close(model(clip), expected, **block_tolerance(other, torch.float32, expected))


def test_a_deep_copy_of_an_accelerated_model_can_be_restored_by_itself():
    model = accelerate(small_model(slow_depth=18, fast_depth=18))
    clip = small_clip()
    with torch.inference_mode():
        expected = model(clip)
        other = copy.deepcopy(model)
        assert_close(other(clip), expected, rtol=0, atol=0)
        restore(other)
        assert not twins(other)
        assert len(twins(model)) == 24
        assert_close(other(clip), expected, **block_tolerance(other, torch.float32, expected))
    plain = {id(module) for twin in twins(model).values() for module in (twin.plain, *twin.modules())}
    assert not plain & {id(module) for module in other.modules()}


def test_an_accelerated_backbone_can_still_be_initialised():
    model = accelerate(small_model())
    model.backbone.init_weights()
    assert model.backbone.slow_path.layer1[0].last_norm.weight.eq(0).all()


def test_a_whole_accelerated_network_compiles_to_one_graph():
    torch._dynamo.reset()
    model = accelerate(small_model(slow_depth=18, fast_depth=18), strict=True)
    clip = small_clip()
    with torch.no_grad():
        expected = model(clip)
        actual = torch.compile(model, fullgraph=True, backend="eager")(clip)
    assert_close(actual, expected, **block_tolerance(model, torch.float32, expected))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "r50"}, TypeError, "accelerate: model must be a torch.nn.Module, got str"),
        ({"mode": "fast"}, ValueError, "accelerate: mode must be 'inference' or 'training', got 'fast'$"),
        ({"where": "slow"}, TypeError, "accelerate: where must be a function of name and module, got str"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        accelerate(**{"model": ConvBNReLU3d(3, 4, (1, 1, 1)), **arguments})


@pytest.mark.parametrize("function", [explain, restore])
def test_explain_and_restore_want_a_module(function):
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be a torch.nn.Module, got int"):
        function(3)
