import pytest
import torch
from small_networks import small_config

from slowfast_ext.models import build_model, inflate_from_2d

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


def resnet_2d(depth, width=8):
    """Random entries with torchvision's names and shapes for a ResNet of ``width`` stem channels."""
    shapes = {"conv1.weight": (width, 3, 7, 7), **norm("bn1", width)}
    channels, expansion = width, 1 if depth == 18 else 4
    for stage, blocks in enumerate(BLOCKS[depth]):
        inner = width * 2**stage
        for block in range(blocks):
            prefix = f"layer{stage + 1}.{block}"
            layout = [(3, channels, inner), (3, inner, inner)]
            if depth == 50:
                layout = [(1, channels, inner), (3, inner, inner), (1, inner, 4 * inner)]
            for index, (kernel, inputs, outputs) in enumerate(layout, 1):
                shapes[f"{prefix}.conv{index}.weight"] = (outputs, inputs, kernel, kernel)
                shapes.update(norm(f"{prefix}.bn{index}", outputs))
            if channels != inner * expansion:
                shapes[f"{prefix}.downsample.0.weight"] = (inner * expansion, channels, 1, 1)
                shapes.update(norm(f"{prefix}.downsample.1", inner * expansion))
            channels = inner * expansion
    shapes.update({"fc.weight": (1000, channels), "fc.bias": (1000,)})
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def norm(name, channels):
    return {f"{name}.{entry}": (channels,) for entry in ("weight", "bias", "running_mean", "running_var")} | {
        f"{name}.num_batches_tracked": ()
    }


@pytest.mark.parametrize("depth", [18, 50])
def test_filters_sum_to_the_2d_ones_and_lateral_inputs_are_zero(depth):
    pathway = build_model(small_config(depth)).backbone.slow_path
    images = resnet_2d(depth)
    report = inflate_from_2d(pathway, images)
    assert report.unused == ["fc.weight", "fc.bias"]
    assert all("_lateral" in name or ".0.downsample" in name for name in report.kept)
    own = pathway.state_dict()
    for name in report.loaded:
        if name.endswith("conv.weight"):
            source = name.replace("downsample.conv", "downsample.0").replace(".conv.weight", ".weight")
            expected = images[source]
            channels = expected.shape[1]
            torch.testing.assert_close(own[name][:, :channels].sum(2), expected)
            assert own[name][:, channels:].eq(0).all()
    stem = own["layer3.0.conv1.conv.weight"]
    assert stem.shape[2] == 3
    torch.testing.assert_close(stem[:, :, 0], stem[:, :, 2])
    assert own["layer2.1.conv2.bn.running_var"].equal(images["layer2.1.bn2.running_var"])


def test_laterals_keep_their_initialisation():
    pathway = build_model(small_config()).backbone.slow_path
    before = pathway.conv1_lateral.conv.weight.clone()
    inflate_from_2d(pathway, resnet_2d(50))
    assert pathway.conv1_lateral.conv.weight.equal(before)


def test_other_widths_and_other_networks_are_refused_before_any_change():
    model = build_model(small_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"conv1.weight must fit conv1.conv.weight .* got \(8, 3, 7, 7\)"):
        inflate_from_2d(model.backbone.fast_path, resnet_2d(50))
    with pytest.raises(ValueError, match="must be of a 2-D ResNet"):
        inflate_from_2d(model.backbone.slow_path, {"encoder.weight": torch.zeros(2)})
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
