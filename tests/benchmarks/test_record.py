"""What gpu_check.sh leaves becomes the record: files, tables, targets, pictures. The documents are those of tiny runs
on a CPU, relabelled as a GPU's."""

import copy
import json
import re
from pathlib import Path

import latency
import layer_variants
import layers
import pytest
import record
import record_tables
import recorded
import report
import torch
import training
import training_curves
from small_networks import small_config

import slowfast_ext
from slowfast_ext import models
from slowfast_ext.engine import ceilings

GPU = {"machine": "AMD EPYC", "commit": "1fe27a1", "gpu": "NVIDIA H100 80GB HBM3"}
GPU |= {"driver": "580.1", "cuda": "13.0", "cudnn": 91002}
BEGAN = "2026-11-25T04:35:16+00:00"
NAME = "nvidia-h100-80gb-hbm3-2026-11-25"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A document of each benchmark, and the picture that layers.py made."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("measured")
    network = small_config(50, 50, resample_rate=8, speed_ratio=8, fusion_kernel=5, clip_len=8)
    threads = torch.get_num_threads()
    tiny = ["--device", "cpu", "--crop", "32", "--rounds", "2"]
    chosen = ["--layers", "slow_path.layer1.0.*, slow_path.conv1*, cls_head", "--blocks", "fast_path.layer1.0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slowfast_ext, "create_model", lambda name: models.build_model(network))
        patch.setattr(torch, "compile", lambda model, **options: model)
        patch.setitem(ceilings._GEMM_SIZE, "cpu", 64)
        patch.setitem(ceilings._COPIED_BYTES, "cpu", 2**16)
        patch.setitem(layer_variants.FLUSHED_BYTES, "cpu", 2**12)
        for name, value in (("WINDOW", 2), ("BATCH", 4), ("SIZE", 32), ("FRAMES", 8)):
            patch.setattr(training_curves, name, value)
        torch.set_num_threads(1)
        networks = ["--variants", "eager,eager_channels_last,compile,accelerate", "--views", "1"]
        steps = ["--variants", "eager_channels_last,accelerate,accelerate_graphs"]
        for main, options in (
            (latency.main, [*tiny, *networks]),
            (layers.main, [*tiny, *chosen, "--plot", str(folder / "roofline.png")]),
            (training.main, [*tiny, "--batch", "2", *steps]),
            (training_curves.main, ["--device", "cpu", "--steps", "4"]),
        ):
            main([*options, "--json", str(folder / f"{main.__module__}.json")])
    torch.set_num_threads(threads)
    documents = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    # An engine takes seconds on a CPU, for its process.
    ours = documents["latency"]["variants"]
    ours.append(ours[-1] | {"name": "engine"})
    for document in documents.values():
        document["environment"] |= GPU
        document["began"] = BEGAN
    return documents, folder / "roofline.png"


@pytest.fixture
def documents(measured):
    """A document of each stage of gpu_check.sh that measures."""
    found = {}
    for stage in recorded.stages():
        document = found[stage] = copy.deepcopy(measured[0][recorded.BENCHMARKS[recorded.kind_of(stage)]])
        workload, dtype = document["workload"], (re.findall(r"b?float\d+", stage) or ["bfloat16"])[0]
        for model in re.findall(r"r\d+_\d+x\d+", stage):
            workload["model"] = f"slowfast_{model}x1_256e_kinetics400_rgb"
        workload |= {"dtypes": [dtype]} if "dtypes" in workload else {"dtype": dtype}
        for row in document.get("variants", ()):
            row["dtype"] = dtype
    return found


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Where results and page go in these tests."""
    for name in ("results", "docs", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(recorded, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "PAGE", tmp_path / "docs" / "gpu.md")


def write(folder, documents):
    for stage, document in documents.items():
        (folder / f"{stage}.json").write_text(json.dumps(document))


def some(documents, *stages):
    return {stage: documents[stage] for stage in stages}


LATENCY = "latency_r50_4x16_bfloat16_batch1"
VIDEO = "latency_r50_4x16_bfloat16_batch30"
LAYERS = "layers_r50_4x16_bfloat16_batch30"
STEPS = "training_r50_4x16_bfloat16_batch8"
GRAPHS = "graphs_r50_4x16_bfloat16_batch8"


def cells(table):
    """Rows of a Markdown table by their first cell; the others are those of the named columns."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    header, rule, *rows = lines
    assert set(rule) == {"---"}
    assert {len(row) for row in rows} <= {len(header)}
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_every_stage_that_measures_is_understood():
    assert len(recorded.stages()) == 57  # all but build, test and the sanitizers
    kinds = {recorded.kind_of(stage) for stage in recorded.stages()}
    assert kinds == set(recorded.BENCHMARKS)
    for stage in (LATENCY, VIDEO, LAYERS, STEPS, GRAPHS):
        assert stage in recorded.stages()
    for model in record_tables.VIDEOS_PER_SECOND:
        assert {f"latency_{model}_bfloat16_batch30", f"graphs_{model}_bfloat16_batch8"} <= set(recorded.stages())


def test_all_stages_are_taken_under_names_of_device_and_date(documents, tmp_path, capsys):
    write(tmp_path / "out", documents)
    assert record.main([str(tmp_path / "out")]) == 0
    files = {path.name: path for path in (tmp_path / "results").iterdir()}
    assert set(files) == {f"{NAME}-{stage}.json" for stage in documents}
    for stage, document in documents.items():
        assert json.loads(files[f"{NAME}-{stage}.json"].read_text()) == document
    assert recorded.newest_on_gpus() == {GPU["gpu"]: documents}
    assert list(recorded.newest_on_gpus()[GPU["gpu"]]) == list(recorded.stages())
    assert capsys.readouterr().out.endswith("missing: none\n")


def test_a_machine_without_a_gpu_is_named_by_its_processor():
    assert recorded.device_name({"machine": "AMD EPYC"}) == "cpu-amd-epyc"
    assert recorded.device_name({"machine": "AMD EPYC", "gpu": "NVIDIA H200"}) == "nvidia-h200"


def test_missing_and_damaged_documents_are_listed_and_the_others_taken(documents, tmp_path, capsys):
    write(tmp_path / "out", some(documents, VIDEO, LAYERS, STEPS))
    text = (tmp_path / "out" / f"{LAYERS}.json").read_text()
    (tmp_path / "out" / f"{LAYERS}.json").write_text(text[: len(text) // 2])
    (tmp_path / "out" / f"{GRAPHS}.json").write_text(json.dumps(documents[LATENCY]))
    del documents[LATENCY]["variants"][0]["median_ms"]
    write(tmp_path / "out", some(documents, LATENCY))
    assert record.main([str(tmp_path / "out")]) == 1
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {f"{NAME}-{VIDEO}.json", f"{NAME}-{STEPS}.json"}
    *_, missing, first, second, third = capsys.readouterr().out.splitlines()
    assert missing.startswith("missing: latency_r50_4x16_float16_batch1, ")
    assert not any(stage in missing for stage in (VIDEO, LAYERS, STEPS, GRAPHS, LATENCY))
    assert first == f"damaged: {LATENCY}.json: KeyError: 'median_ms'"
    assert second.startswith(f"damaged: {LAYERS}.json: JSONDecodeError: ")
    assert third == f"damaged: {GRAPHS}.json: ValueError: of the benchmark latency"


def test_nothing_but_damaged_documents_is_no_record(tmp_path, capsys):
    (tmp_path / "out" / f"{LATENCY}.json").touch()
    assert record.main([str(tmp_path / "out")]) == 1
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": "53ffe45"}, f"one commit, got 1fe27a1 ({LATENCY}) and 53ffe45 ({STEPS})"),
        ({"gpu": "NVIDIA H200"}, f"one gpu, got {GPU['gpu']} ({LATENCY}) and NVIDIA H200"),
        ({"machine": "Intel Xeon"}, "one machine, got "),
        ({"torch": "2.11.0"}, "one torch, got "),
    ],
)
def test_documents_of_two_runs_are_refused(changes, message, documents, tmp_path, capsys):
    documents[STEPS]["environment"] |= changes
    write(tmp_path / "out", some(documents, LATENCY, STEPS))
    assert f"OUT must hold documents of {message}" in refused(capsys, str(tmp_path / "out"))
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize(
    ("commit", "message"),
    [
        ("1fe27a1-dirty", "OUT must hold documents of a commit without changes, got 1fe27a1-dirty"),
        (None, "OUT must hold documents that name their commit, got none (see COMMIT of gpu_check.sh)"),
    ],
)
def test_a_commit_that_says_not_what_ran_is_refused(commit, message, documents, tmp_path, capsys):
    documents[LATENCY]["environment"]["commit"] = commit
    write(tmp_path / "out", some(documents, LATENCY))
    assert message in refused(capsys, str(tmp_path / "out"))
    assert list((tmp_path / "results").iterdir()) == []


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        record.main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_bad_arguments_are_refused(tmp_path, capsys, monkeypatch):
    assert "OUT or --page must be given, got neither" in refused(capsys)
    for name in ("out", "nowhere"):
        message = f"OUT must be a folder with documents of gpu_check.sh's stages, got {tmp_path / name}"
        assert message in refused(capsys, str(tmp_path / name))
    monkeypatch.setattr(latency.importlib.util, "find_spec", lambda name: None)
    assert "--page needs matplotlib, which is not installed" in refused(capsys, "--page")


def test_samples_are_left_out_of_a_large_file_only(documents, tmp_path):
    documents[VIDEO]["variants"][0]["samples_ms"] *= 5000
    write(tmp_path / "out", some(documents, LATENCY, VIDEO))
    assert record.main([str(tmp_path / "out")]) == 0
    small, large = (
        json.loads((tmp_path / "results" / f"{NAME}-{stage}.json").read_text()) for stage in (LATENCY, VIDEO)
    )
    assert small == documents[LATENCY]
    assert large["samples_ms"] == "left out of a file larger than 200000 bytes"
    assert all("samples_ms" not in row and row["median_ms"] > 0 for row in large["variants"])
    assert record.main(["--page"]) == 0


def test_the_commit_of_a_copy_without_its_repository_is_given(monkeypatch):
    monkeypatch.setattr(report, "_run", lambda *command: None)
    assert report.describe_environment(torch.device("cpu"))["commit"] is None
    monkeypatch.setenv("COMMIT", "1fe27a1")
    assert report.describe_environment(torch.device("cpu"))["commit"] == "1fe27a1"


def test_without_results_of_a_gpu_no_page_is_written(documents, tmp_path, capsys):
    del documents[LATENCY]["environment"]["gpu"]
    write(tmp_path / "out", some(documents, LATENCY))
    assert record.main([str(tmp_path / "out"), "--page"]) == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == [f"cpu-amd-epyc-2026-11-25-{LATENCY}.json"]
    assert list((tmp_path / "docs").iterdir()) == []
    assert f"not written: {tmp_path / 'results'} has no result of a GPU" in capsys.readouterr().out


def test_the_page_has_every_table_and_picture(documents, tmp_path, capsys):
    write(tmp_path / "out", documents)
    assert record.main([str(tmp_path / "out"), "--page"]) == 0
    assert capsys.readouterr().out.endswith(f"written: {tmp_path / 'docs' / 'gpu.md'}\n")
    page = (tmp_path / "docs" / "gpu.md").read_text()
    assert re.findall(r"^##+ (.*)$", page, re.MULTILINE) == [
        GPU["gpu"],
        "First targets",
        "Whole networks",
        "Whole networks, torch.compile with max-autotune",
        "Training steps",
        "Training steps, compiled into CUDA graphs",
        "Loss of plain and of fused blocks",
    ]
    assert (
        page.count(f"{GPU['gpu']}, driver 580.1 | torch {torch.__version__} | CUDA 13.0, cuDNN 91002 | commit 1fe27a1:")
        == 5
    )
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", page, re.MULTILINE)
    stages = [
        f"{kind}_{model}_bfloat16_{batch}"
        for kind in ("latency", "speedup", "roofline")
        for model in record_tables.VIDEOS_PER_SECOND
        for batch in ("batch1", "batch30")
    ]
    assert sorted(pictures) == sorted(f"gpu-nvidia-h100-80gb-hbm3-{stage}.png" for stage in stages)
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"gpu.md", *pictures}
    assert all((tmp_path / "docs" / name).read_bytes().startswith(PNG) for name in pictures)


def test_the_newest_result_of_each_stage_counts(documents, tmp_path):
    write(tmp_path / "out", some(documents, LATENCY, STEPS))
    record.main([str(tmp_path / "out")])
    documents[LATENCY]["began"] = "2026-11-26T00:00:00+00:00"
    documents[LATENCY]["environment"]["commit"] = "53ffe45"
    (tmp_path / "out" / f"{STEPS}.json").unlink()
    write(tmp_path / "out", some(documents, LATENCY))
    record.main([str(tmp_path / "out"), "--page"])
    assert len(list((tmp_path / "results").iterdir())) == 3
    page = (tmp_path / "docs" / "gpu.md").read_text()
    assert re.findall("commit (.*):", page) == ["53ffe45", "1fe27a1"]


def test_networks_are_compared_with_eager_and_with_the_best_of_torch_compile(documents):
    document = documents[VIDEO]
    for row in document["variants"]:
        row["median_ms"] = {"eager_channels_last": 8.0, "compile": 6.0, "engine": 2.0}.get(row["name"], 10.0)
        row |= {"p10_ms": row["median_ms"] - 1, "p90_ms": row["median_ms"] + 1, "roofline_fraction": 0.5}
        row["videos_per_second"] = 1e3 / row["median_ms"]
    document["variants"][0] |= {"status": "failed", "reason": "no memory"}
    table = record_tables.networks([document])
    lines = [line.split(" | ")[3:9] for line in table.splitlines()[2:6]]
    assert lines == [
        ["eager_channels_last", "8 (7 to 9)", "1.00x", "0.75x", "125", "50%"],
        ["compile", "6 (5 to 7)", "1.33x", "1.00x", "166.7", "50%"],
        ["accelerate", "10 (9 to 11)", "0.80x", "0.60x", "100", "50%"],
        ["engine", "2 (1 to 3)", "4.00x", "3.00x", "500", "50%"],
    ]
    assert table.endswith("Not timed:\n\n- eager in r50_4x16x1, bfloat16, 1 clips: failed, no memory")


def set_times(document, **milliseconds):
    for row in document["variants"]:
        row["median_ms"] = milliseconds.get(row["name"], 100.0)
        row["videos_per_second"] = 1e3 / row["median_ms"]


def test_targets_are_reached_missed_or_not_measured(documents):
    set_times(documents[VIDEO], eager=30.0, eager_channels_last=15.0, compile=9.0, engine=8.0, accelerate=9.5)
    set_times(documents[LATENCY], eager_channels_last=1.5, compile=0.9, engine=0.75)
    set_times(documents[STEPS], eager_channels_last=130.0, accelerate=100.0)
    set_times(documents[GRAPHS], eager_channels_last=130.0, accelerate_graphs=125.0)
    for row in documents[STEPS]["variants"]:
        row["peak_memory_bytes"] = {"eager_channels_last": 1000, "accelerate": 660}.get(row["name"])
    found = cells(record_tables.targets(some(documents, LATENCY, VIDEO, STEPS, GRAPHS)))
    columns = {name: (row["wanted"], row["measured"], row["outcome"]) for name, row in found.items()}
    assert columns["videos of 30 views a second, r50_4x16, bfloat16"] == ("at least 100", "125", "reached by 25.0%")
    assert columns["videos of 30 views a second, r50_8x8, bfloat16"] == ("at least 65", "-", "-")
    assert columns["videos of 30 views a second, r101_8x8, bfloat16"] == ("at least 40", "-", "-")
    assert columns["one clip, r50_4x16, bfloat16"] == ("at most 0.6 ms", "0.75 ms", "missed by 25.0%")
    assert columns["fastest of slowfast_ext over the fastest of plain PyTorch"] == (
        "at least 2.00x",
        f"1.88x in {VIDEO}, the least of 2",
        "missed by 6.2%; 1 of 2 reach it, 16 stages missing",
    )
    assert columns["fastest of slowfast_ext over the fastest of torch.compile"] == (
        "at least 1.00x",
        f"1.12x in {VIDEO}, the least of 2",
        "reached by 12.5%; 2 of 2 reach it, 22 stages missing",
    )
    training_of = "in training over eager_channels_last, r50_4x16, bfloat16"
    assert columns[f"accelerate {training_of}"] == ("at least 1.30x", "1.30x", "reached by 0.0%")
    assert columns[f"accelerate_graphs {training_of}"] == ("at least 1.30x", "1.04x", "missed by 20.0%")
    memory = "accelerate in training, peak memory above weights, of eager_channels_last's, r50_4x16, bfloat16"
    assert columns[memory] == ("at most 60%", "66%", "missed by 10.0%")
    assert columns[memory.replace("r50_4x16", "r50_8x8")] == ("at most 60%", "-", "-")
    assert columns["conv3d_bn_relu, of its floor"] == ("at least 60%", "-", "-")


def test_the_slowest_place_of_each_operator_counts(documents):
    document = documents[LAYERS]
    rows = {row["name"]: row["measured"] for row in document["rows"]}
    for measured in rows.values():
        for entry in measured.values():
            entry["floor_fraction"] = 0.9
    rows["slow_path.layer1.0.conv2"]["conv3d_bn_relu"]["floor_fraction"] = 0.3
    rows["fast_path.layer1.0"]["conv3d_bn_relu"]["floor_fraction"] = 0.1  # three launches, not one operator
    rows["cls_head"]["fused"]["floor_fraction"] = 0.66
    rows["slow_path.conv1_lateral"]["fused"] = {"status": "wrong", "reason": "NaN", "relative_error": None}
    found = cells(record_tables.targets({LAYERS: document}))
    measured = {name: (row["measured"], row["outcome"]) for name, row in found.items() if "floor" in name}
    assert measured == {
        "conv3d_bn_relu, of its floor": (
            f"30% in slow_path.layer1.0.conv2 of {LAYERS}, the least of 6",
            "missed by 50.0%; 5 of 6 reach it, 17 stages missing",
        ),
        "fast_bottleneck, of its floor": (
            f"90% in fast_path.layer1.0 of {LAYERS}, the least of 1",
            "reached by 50.0%; 1 of 1 reach it, 17 stages missing",
        ),
        "stem, of its floor": ("-", "-"),
        "lateral_fuse_into, of its floor": ("-", "-"),
        "pool_head, of its floor": (
            f"66% in cls_head of {LAYERS}, the least of 1",
            "reached by 10.0%; 1 of 1 reach it, 17 stages missing",
        ),
    }


def test_layers_draws_its_own_roofline(measured):
    assert measured[1].read_bytes().startswith(PNG)


def test_points_are_below_the_roof_that_they_are_measured_against(documents):
    rows = documents[LAYERS]["rows"]
    peak, bandwidth = 3e12, 1e11
    for row in rows:
        floor = max(2e6 * row["macs"] / peak, 1e6 * row["bytes"] / bandwidth)
        for name, entry in row["measured"].items():
            entry["median_us"] = floor * {"eager": 4, "conv3d_bn_relu": 2}.get(name, 3)
    ours = record.roofline_picture.points(rows, ("conv3d_bn_relu", "fused"))
    plain = record.roofline_picture.points(rows, ("eager", "cudnn"))
    assert len(ours) == len(plain) == len([row for row in rows if row["macs"]]) > 5
    for intensity, rate in plain:
        assert rate == pytest.approx(min(peak, intensity * bandwidth) / 4)
    # The fastest of each: only the head has nothing but the fused operator.
    fractions = sorted(rate / min(peak, intensity * bandwidth) for intensity, rate in ours)
    assert fractions == pytest.approx([1 / 3] + [1 / 2] * (len(ours) - 1))


def test_the_committed_page_is_that_of_the_committed_results(monkeypatch):
    root = Path(recorded.__file__).parents[1]
    monkeypatch.setattr(recorded, "RESULTS", root / "benchmarks" / "results")
    written = root / "docs" / "gpu.md"
    documents = recorded.newest_on_gpus()
    assert written.exists() == bool(documents)
    for gpu, stages in documents.items():
        text = written.read_text(encoding="utf-8")
        assert f"## {gpu}\n\n{record_tables.page(stages)}" in text
        assert all((written.parent / name).exists() for name in re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE))
