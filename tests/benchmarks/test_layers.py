"""The layer table: totals and layers against an independent count, and the timing path on a tiny network."""

import csv
import dataclasses
import functools
import inspect
import json

import layer_variants
import layers
import pytest
import torch
import torch.nn.functional as F
from roofline import compute_milliseconds, count_layers, floor_milliseconds, fused_blocks, overlap_milliseconds, plans
from variants import Outcome

import slowfast_ext
from slowfast_ext import models, ops
from slowfast_ext.engine import Ceilings, ceilings

R50_4X16 = "slowfast_r50_4x16x1_256e_kinetics400_rgb"
R50_8X8_NORM = "slowfast_r50_8x8x1_256e_kinetics400_rgb_steplr"
R101_8X8 = "slowfast_r101_8x8x1_256e_kinetics400_rgb"

# As they were counted independently: batch norm and ReLU behind the laterals, temporal kernel 5 in those of R101.
NETWORKS = {
    "r50_4x16": dataclasses.replace(models.get_config(R50_4X16), lateral_norm=True),
    "r50_8x8": models.get_config(R50_8X8_NORM),
    "r101_8x8": dataclasses.replace(models.get_config(R101_8X8), lateral_norm=True, fusion_kernel=5),
}
COLUMNS = [
    "compute",
    "eager",
    "compiled",
    "layers",
    "fast_blocks",
    "stems",
    "slow_blocks",
    "overlap_layers",
    "overlap_stems",
]
# (network, clips, TFLOP/s) -> ms of the columns at 4.3 TB/s; without the head. Clips are 32 x 256 x 256 in bfloat16.
TOTALS = {
    ("r50_4x16", 30, 788): (2.749, 13.508, 9.038, 5.412, 4.386, 4.217, 3.761, 4.207, 2.941),
    ("r50_4x16", 30, 489): (4.433, 14.801, 10.331, 6.630, 5.617, 5.471, 5.036, 4.433, 4.433),
    ("r50_4x16", 1, 788): (0.092, 0.451, 0.302, 0.183, 0.148, 0.143, 0.128, 0.155, 0.113),
    ("r50_4x16", 1, 489): (0.148, 0.494, 0.345, 0.222, 0.188, 0.183, 0.169, 0.155, 0.148),
    ("r50_8x8", 30, 788): (5.003, 21.019, 14.285, 8.652, 7.626, 7.361, 6.448, 6.305, 5.003),
    ("r50_8x8", 30, 489): (8.070, 23.454, 16.720, 10.937, 9.925, 9.705, 8.836, 8.070, 8.070),
    ("r50_8x8", 1, 788): (0.167, 0.701, 0.477, 0.290, 0.256, 0.247, 0.217, 0.225, 0.179),
    ("r50_8x8", 1, 489): (0.269, 0.782, 0.558, 0.366, 0.332, 0.325, 0.296, 0.269, 0.269),
    ("r101_8x8", 30, 788): (9.587, 32.814, 22.349, 14.407, 12.883, 12.619, 11.705, 9.587, 9.587),
    ("r101_8x8", 30, 489): (15.462, 37.925, 27.460, 18.941, 17.398, 17.178, 16.309, 15.462, 15.462),
    ("r101_8x8", 1, 788): (0.320, 1.094, 0.746, 0.484, 0.433, 0.425, 0.394, 0.338, 0.320),
    ("r101_8x8", 1, 489): (0.515, 1.265, 0.916, 0.635, 0.583, 0.576, 0.547, 0.515, 0.515),
}
# network, clips, layer -> GMAC, MB, us of memory at 4.3 TB/s, us of operations at 788 TFLOP/s, bound
LAYERS = [
    ("r50_4x16", 30, "slow_path.conv1", 18.50, 298.9, 69.5, 46.9, "memory"),
    ("r50_4x16", 30, "fast_path.conv1", 92.48, 629.2, 146.3, 234.7, "compute"),
    ("r50_4x16", 30, "slow_path.conv1_lateral", 0.31, 55.1, 12.8, 0.8, "memory"),
    ("r50_4x16", 30, "slow_path.layer1.0.conv1", 2.52, 141.6, 32.9, 6.4, "memory"),
    ("r50_4x16", 30, "fast_path.layer1.2.conv3", 1.01, 566.2, 131.7, 2.6, "memory"),
    ("r50_4x16", 30, "slow_path.layer2.0.downsample", 20.13, 204.8, 47.6, 51.1, "compute"),
    ("r50_4x16", 30, "fast_path.layer3.2.conv2", 2.26, 31.5, 7.3, 5.7, "memory"),
    ("r50_4x16", 30, "slow_path.layer4.0.conv1", 60.40, 114.0, 26.5, 153.3, "compute"),
    ("r50_4x16", 1, "slow_path.layer4.0.conv1", 2.01, 7.6, 1.8, 5.1, "compute"),
    ("r50_8x8", 30, "slow_path.conv1_lateral", 0.88, 94.4, 21.9, 2.2, "memory"),
    ("r50_8x8", 30, "slow_path.layer1.1.conv3", 16.11, 1132.5, 263.4, 40.9, "memory"),
    ("r50_8x8", 30, "slow_path.layer2.0.conv2", 36.24, 314.9, 73.2, 92.0, "compute"),
    ("r50_8x8", 30, "slow_path.layer3_lateral", 14.09, 94.8, 22.1, 35.8, "compute"),
    ("r50_8x8", 1, "slow_path.layer3.5.conv3", 0.54, 10.0, 2.3, 1.4, "memory"),
    ("r101_8x8", 30, "slow_path.layer1_lateral", 10.07, 377.5, 87.8, 25.5, "memory"),
    ("r101_8x8", 30, "slow_path.layer3.22.conv1", 48.32, 158.9, 36.9, 122.6, "compute"),
    ("r101_8x8", 1, "slow_path.layer4.2.conv3", 0.54, 6.8, 1.6, 1.4, "memory"),
]


@functools.cache
def work_of(network, clips, dtype=torch.bfloat16):
    """Layers and blocks."""
    with torch.device("meta"):
        model = models.build_model(NETWORKS[network]).eval()
        found = count_layers(model, torch.empty(clips, 3, 32, 256, 256, dtype=dtype))
    return found, fused_blocks(model, found)


def totals_of(found, blocks, ceilings):
    ways = plans(found, blocks)
    totals = {name: floor_milliseconds(ceilings, kernels) for name, kernels in ways.items()}
    totals["compute"] = compute_milliseconds(ceilings, found)
    for name in ("layers", "stems"):
        totals[f"overlap_{name}"] = overlap_milliseconds(ceilings, ways[name])
    return [totals[name] for name in COLUMNS]


@pytest.mark.parametrize(("network", "clips", "peak"), TOTALS)
def test_totals_agree_with_the_independent_count(network, clips, peak):
    found, blocks = work_of(network, clips)
    expected, ceilings = TOTALS[network, clips, peak], Ceilings(peak * 1e12, 4.3e12)
    assert totals_of(found[:-1], blocks, ceilings) == pytest.approx(expected, rel=1e-3, abs=9e-4)  # 489 is rounded
    assert totals_of(found, blocks, ceilings) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("network", "eager", "fused"), [("r50_4x16", 360, 112), ("r101_8x8", 700, 214)])
def test_there_are_as_many_kernels_as_counted_independently(network, eager, fused):
    found, blocks = work_of(network, 30)
    ways = plans(found[:-1], blocks)
    assert (len(ways["eager"]), len(ways["layers"])) == (eager, fused)


@pytest.mark.parametrize(("network", "clips", "layer", "gmac", "megabytes", "memory_us", "compute_us", "bound"), LAYERS)
def test_a_layer_agrees_with_the_independent_count(
    network, clips, layer, gmac, megabytes, memory_us, compute_us, bound
):
    (counted,) = (entry for entry in work_of(network, clips)[0] if layers.label(entry) == layer)
    ceilings = Ceilings(788e12, 4.3e12)
    row = layers.describe_row(counted, torch.nn.Identity(), [ceilings], {})
    assert row["macs"] / 1e9 == pytest.approx(gmac, abs=5.1e-3)
    assert row["bytes"] / 1e6 == pytest.approx(megabytes, abs=0.051)
    assert row["floor_us"] == [pytest.approx(max(memory_us, compute_us), abs=0.051)]
    assert row["bound"] == bound


def test_a_block_moves_its_input_weights_and_output_and_computes_what_its_layers_do():
    blocks = work_of("r50_4x16", 30)[1]
    assert [block.kind for block in blocks].count("fast_bottleneck") == 16
    (block,) = (block for block in blocks if block.name == "backbone.fast_path.layer2.0")
    pixels, weights = 30 * 32 * 64 * 64, 32 * 16 * 3 + 16 * 16 * 9 + 16 * 64 + 32 * 64
    assert block.bytes == 2 * (32 * pixels + 64 * pixels // 4 + weights)
    assert block.macs == pixels * 32 * 16 * 3 + pixels // 4 * (16 * 16 * 9 + 16 * 64 + 32 * 64)
    assert block.macs == sum(layer.macs for layer in block.layers)


def test_float32_takes_twice_as_long_at_its_own_ceilings(capsys):
    assert layers.main(["--device", "meta", "--model", R50_8X8_NORM, "--dtype", "float32"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    expected = {"eager": 42.0, "compiled": 28.6, "layers": 17.3, "stems": 14.7, "slow_blocks": 12.9}
    assert {name: float(rows[name][3]) for name in expected} == pytest.approx(expected, rel=0.01)


def test_the_published_network_is_within_one_per_cent_of_the_counted_one(tmp_path, capsys):
    paths = tmp_path / "layers.json", tmp_path / "layers.csv"
    assert layers.main(["--device", "meta", "--json", str(paths[0]), "--csv", str(paths[1])]) == 0
    document = json.loads(paths[0].read_text())
    assert document["workload"]["clip"] == [30, 3, 32, 256, 256]
    totals = {row["name"]: row for row in document["totals"]}
    for index, peak in enumerate((788, 489)):
        measured = [totals[name]["floor_ms"][index] for name in COLUMNS]
        assert measured == pytest.approx(TOTALS["r50_4x16", 30, peak], rel=0.01)
    assert totals["layers"]["videos_per_second"][0] == pytest.approx(185, rel=0.01)

    screen = capsys.readouterr().out
    assert "ceilings given, NOT measured: 788 or 489 TFLOP/s, 4.3 TB/s" in screen
    assert "nothing was timed" in screen
    rows = list(csv.DictReader(paths[1].open()))
    kinds = [row["kind"] for row in rows]
    expected = {"layer": 113, "fast_bottleneck": 16, "stem": 2, "slow_bottleneck": 3}
    assert {kind: kinds.count(kind) for kind in set(kinds)} == expected
    assert rows[0]["kernel"] == "1x7x7"
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    # The table counts what it does not repeat.
    table = screen.split("whole network")[0].splitlines()[6:]
    assert sum(int(line.replace(" (", "(").split()[1]) for line in table if line.strip()) == len(rows)


def test_given_ceilings_are_used(tmp_path):
    path = tmp_path / "layers.json"
    layers.main(["--device", "meta", "--peak", "100,50", "--bandwidth", "2", "--batch", "2", "--json", str(path)])
    document = json.loads(path.read_text())
    row = next(row for row in document["rows"] if row["name"] == "fast_path.conv1")
    assert row["floor_us"] == [pytest.approx(2 * row["macs"] / peak * 1e6) for peak in (100e12, 50e12)]
    row = next(row for row in document["rows"] if row["name"] == "slow_path.conv1.maxpool")
    assert row["floor_us"] == [pytest.approx(row["bytes"] / 2e12 * 1e6)] * 2


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--layers", "slow_path.layer?_lateral"], [f"slow_path.layer{stage}_lateral" for stage in (1, 2, 3)]),
        (["--blocks", "fast_path, *.layer1.2"], ["slow_path.layer1.2", "fast_path", "fast_path.layer1.2"]),
        (["--layers", "cls_head", "--blocks", "slow_path"], ["cls_head", "slow_path"]),
    ],
)
def test_patterns_choose_the_rows(options, names):
    chosen = layers.parse_options(["--device", "meta", "--batch", "1", *options]).work.chosen
    assert [layers.label(work) for work in chosen] == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "meta", "--rounds", "3"], "must be left out where nothing is timed"),
        (["--device", "meta", "--seconds", "3"], "must be left out where nothing is timed"),
        (["--device", "meta", "--plot", "a.png"], "must be left out where nothing is timed"),
        (["--device", "cpu", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--device", "cpu", "--peak", "788"], "--peak and --bandwidth must be given together"),
        (["--device", "meta", "--peak", "788,fast"], "--peak must be positive numbers with commas between"),
        (["--device", "meta", "--peak", "-1"], "--peak must be positive numbers with commas between, got '-1'"),
        (["--device", "meta", "--bandwidth", "0"], "--bandwidth must be positive, got 0"),
        (["--device", "meta", "--layers", "slow_path.layer9.*"], "--layers must match one of 113 names"),
        (["--device", "meta", "--blocks", "stem"], "--blocks must match one of 21 names"),
        (["--device", "meta", "--csv", "no/such/folder/a.csv"], "--csv must be in an existing folder"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message, capsys, monkeypatch):
    monkeypatch.setattr(layers, "measure", lambda options: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as stopped:
        layers.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def fast_bottleneck(x, a, bias_a, b, bias_b, c, bias_c, shortcut, bias_shortcut, *, stride):
    """Stands for the operator of that name, whether there is one or not."""
    y = F.conv3d(F.conv3d(x, a, bias_a, padding=(1, 0, 0)).relu(), b, bias_b, (1, stride, stride), (0, 1, 1)).relu()
    x = x if shortcut is None else F.conv3d(x, shortcut, bias_shortcut, (1, stride, stride))
    return (F.conv3d(y, c, bias_c) + x).relu()


@pytest.fixture(scope="module")
def tiny():
    """Under the name of R50 the same with 8 and 2 channels, in one thread, with ceilings that take no time to measure,
    and with one fused operator."""
    network = models.SlowFastConfig(
        models.PathwayConfig(50, base_channels=8, stem_temporal_kernel=1, temporal_kernels=(1, 1, 3, 3)),
        models.PathwayConfig(50, base_channels=2, stem_temporal_kernel=5, temporal_kernels=(3, 3, 3, 3)),
        resample_rate=8,
        speed_ratio=8,
        fusion_kernel=5,
        clip_len=8,
    )
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slowfast_ext, "create_model", lambda name: models.build_model(network))
        patch.setitem(ceilings._GEMM_SIZE, "cpu", 64)
        patch.setitem(ceilings._COPIED_BYTES, "cpu", 2**16)
        patch.setitem(layer_variants.FLUSHED_BYTES, "cpu", 2**12)
        patch.setattr(layer_variants, "OPERATORS", {"fast_bottleneck": "fast_bottleneck"})
        patch.setattr(ops, "fast_bottleneck", fast_bottleneck, raising=False)
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


def test_a_flush_reads_as_much_as_it_says(monkeypatch):
    monkeypatch.setitem(layer_variants.FLUSHED_BYTES, "cpu", 400)
    assert layer_variants.cache_flush(torch.device("cpu"))() == 100  # ones in float32


def run(tmp_path, *options):
    """Exit status, document."""
    path = tmp_path / "layers.json"
    status = layers.main(["--device", "cpu", "--crop", "32", "--rounds", "1", "--json", str(path), *options])
    return status, json.loads(path.read_text())


def test_every_layer_is_timed_on_a_cpu(tiny, tmp_path, capsys):
    status, document = run(tmp_path)
    assert status == 0
    assert document["implementations"] == ["eager", "conv3d_bn_relu", "fused"]
    assert document["ceilings"]["source"] == "measured"
    (peak,) = document["ceilings"]["operations_per_second"]
    rows = {row["name"]: row for row in document["rows"]}
    assert len(rows) == 113 + 16
    for name, row in rows.items():
        expected = {"eager"} if "maxpool" in name or name == "cls_head" else {"eager", "conv3d_bn_relu"}
        assert set(row["measured"]) == expected | ({"fused"} if row["kind"] == "fast_bottleneck" else set())
        floor = max(2 * row["macs"] / peak, row["bytes"] / document["ceilings"]["bytes_per_second"]) * 1e6
        for entry in row["measured"].values():
            assert entry["status"] == "timed"
            assert entry["relative_error"] < 1e-5
            assert entry["rounds"] == 1
            assert entry["floor_fraction"] == pytest.approx(floor / entry["median_us"])

    totals = {row["name"]: row["measured_ms"] for row in document["totals"]}
    assert {name for name, total in totals.items() if total} == {"eager", "layers", "fast_blocks"}
    plain = [row["measured"] for row in rows.values() if row["kind"] == "layer"]
    assert totals["eager"] == pytest.approx(sum(entry["eager"]["median_us"] for entry in plain) / 1e3)
    ours = sum(entry.get("conv3d_bn_relu", entry["eager"])["median_us"] for entry in plain)
    assert totals["layers"] == pytest.approx(ours / 1e3)
    for name, row in rows.items():
        if row["kind"] == "fast_bottleneck":
            inside = [rows[inner]["measured"]["conv3d_bn_relu"]["median_us"] for inner in rows if f"{name}." in inner]
            ours += row["measured"]["fused"]["median_us"] - sum(inside)
    assert totals["fast_blocks"] == pytest.approx(ours / 1e3)
    screen = capsys.readouterr().out
    assert "ceilings measured: " in screen
    assert "no GPU figure was measured" in screen


def test_a_total_counts_the_next_best_where_an_operator_cannot_run_and_nothing_where_one_is_wrong():
    members = work_of("r50_4x16", 1)[1][:2]
    timed = [Outcome("timed", samples=[value]) for value in (1.0, 2.0, 4.0)]
    first = {"fused": timed[0], "conv3d_bn_relu": timed[1]}
    preference = ("fused", "conv3d_bn_relu", "eager")

    def total(second):
        return layers.total_milliseconds(members, preference, {members[0].name: first, members[1].name: second})

    assert total({"fused": timed[2]}) == 5.0
    assert total({"fused": Outcome("failed"), "conv3d_bn_relu": timed[2]}) == 5.0
    assert total({"eager": timed[2]}) == 5.0
    assert total({"fused": Outcome("wrong"), "conv3d_bn_relu": timed[2]}) is None
    assert total({"conv3d_bn_relu": Outcome("failed"), "eager": timed[2]}) is None
    assert total({}) is None
    first = {"conv3d_bn_relu": timed[1]}
    assert total({"conv3d_bn_relu": timed[2]}) is None  # nothing that this total is about


def test_layers_of_one_kind_and_size_share_a_measurement(tiny, tmp_path, monkeypatch):
    prepared = []
    prepare = layers.prepare
    monkeypatch.setattr(layers, "prepare", lambda *arguments: prepared.append(0) or prepare(*arguments))
    _, document = run(tmp_path, "--layers", "fast_path.layer3.*.conv1")
    assert len(document["rows"]) == 6
    assert len(prepared) == 2  # of 32 and of 64 channels


def test_a_block_without_an_operator_is_not_shown_and_part_of_a_network_has_no_total(tiny, tmp_path, monkeypatch):
    monkeypatch.delattr(ops, "fast_bottleneck")
    _, document = run(tmp_path, "--layers", "fast_path.layer1.0.conv?")
    assert [row["name"] for row in document["rows"]] == [f"fast_path.layer1.0.conv{number}" for number in (1, 2, 3)]
    assert {row["measured_ms"] for row in document["totals"]} == {None}
    with pytest.raises(SystemExit):
        run(tmp_path, "--blocks", "fast_path.layer1.0")


def without_residual(x, weight, bias, residual=None, **options):
    return CONV3D_BN_RELU(x, weight, bias, None, **options)


def without_relu(x, weight, bias, residual=None, *, relu, **options):
    return CONV3D_BN_RELU(x, weight, bias, residual, relu=False, **options)


def without_writing(x, weight, bias, residual=None, *, out, **options):
    return out


CONV3D_BN_RELU = ops.conv3d_bn_relu


@pytest.mark.parametrize(
    ("wrong", "layer"),
    [
        (without_residual, "slow_path.layer1.0.conv3"),
        (without_relu, "slow_path.layer1.0.conv1"),
        (without_writing, "slow_path.conv1_lateral"),
    ],
)
def test_a_wrong_output_is_not_timed(tiny, tmp_path, monkeypatch, capsys, wrong, layer):
    monkeypatch.setattr(ops, "conv3d_bn_relu", wrong)
    status, document = run(tmp_path, "--layers", layer)
    assert status == 1
    (row,) = document["rows"]
    assert row["measured"]["eager"]["status"] == "timed"
    assert row["measured"]["conv3d_bn_relu"]["status"] == "wrong"
    assert "median_us" not in row["measured"]["conv3d_bn_relu"]
    assert "conv3d_bn_relu wrong, not timed, in 1 rows" in capsys.readouterr().out


def test_an_implementation_that_cannot_run_is_named_with_its_reason(tiny, tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise RuntimeError("fast_bottleneck: no kernel serves this block")

    monkeypatch.setattr(ops, "fast_bottleneck", refuse)
    status, document = run(tmp_path, "--blocks", "fast_path.layer1.0")
    assert status == 0
    assert document["rows"][0]["measured"]["fused"]["status"] == "failed"
    assert "fused failed, not timed, in 1 rows" in capsys.readouterr().out


def test_cudnn_is_given_what_its_operators_take(tiny, monkeypatch):
    """Their schemas are real, their results are computed by others: there are kernels on GPUs only."""

    def cudnn_convolution_relu(self, weight, bias, stride, padding, dilation, groups):
        return F.conv3d(self, weight, bias, stride, padding, dilation, groups).relu()

    def cudnn_convolution_add_relu(self, weight, z, alpha, bias, stride, padding, dilation, groups):
        return (F.conv3d(self, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    for fake in (cudnn_convolution_relu, cudnn_convolution_add_relu):
        schema = getattr(torch.ops.aten, fake.__name__).default._schema
        assert list(inspect.signature(fake).parameters) == [argument.name for argument in schema.arguments]
        monkeypatch.setattr(torch.ops.aten, fake.__name__, fake)
    monkeypatch.setattr(layer_variants, "implementations", lambda device: ["cudnn"])
    options = layers.parse_options(["--device", "cpu", "--crop", "32", "--layers", "slow_path.*", "--blocks", "fast*"])
    seen = set()
    for work in options.work.chosen:
        module, shapes = layer_variants.part_of(options.work.model, work)
        if repr(module) not in seen and not isinstance(module, torch.nn.MaxPool3d):
            seen.add(repr(module))
            outcomes = layer_variants.prepare(module, shapes, torch.float32, torch.device("cpu"))
            assert outcomes["cudnn"].status == "ready", (work.name, outcomes["cudnn"].reason)
