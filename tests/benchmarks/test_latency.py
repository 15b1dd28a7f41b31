"""The latency table end to end, tiny: what is written, what is refused, and that wrong results are not timed."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import latency
import pytest
import report
import torch
from isolated import Isolated
from variants import VARIANTS, create_network

import slowfast_ext
from slowfast_ext import models

R50 = "slowfast_r50_4x16x1_256e_kinetics400_rgb"
TINY = ["--device", "cpu", "--crop", "32", "--rounds", "2", "--no-compile"]


@pytest.fixture(scope="module", autouse=True)
def small_network():
    """Under the name of R50 the same architecture with fewer layers and channels, in one thread: the benchmark's own
    work is what these tests are about."""
    network = models.SlowFastConfig(
        models.PathwayConfig(18, base_channels=16, stem_temporal_kernel=1, temporal_kernels=(1, 1, 3, 3)),
        models.PathwayConfig(18, base_channels=4, stem_temporal_kernel=5, temporal_kernels=(3, 3, 3, 3)),
        resample_rate=8,
        speed_ratio=8,
        fusion_kernel=5,
    )
    create_model, threads = slowfast_ext.create_model, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            slowfast_ext,
            "create_model",
            lambda name: models.build_model(network) if name == R50 else create_model(name),
        )
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


def run(capsys, *options):
    """Exit status, text on screen."""
    status = latency.main([*TINY, *options])
    return status, capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a run has left latency.json and latency.png."""
    folder = tmp_path_factory.mktemp("latency")
    pytest.importorskip("matplotlib")
    options = [*TINY, "--variants", "eager,eager_channels_last,accelerate,engine"]
    options += ["--json", str(folder / "latency.json"), "--plot", str(folder / "latency.png")]
    with pytest.MonkeyPatch.context() as patch:  # a choice kept among the user's would lie there
        patch.setenv("SLOWFAST_EXT_CACHE", str(folder))
        assert latency.main(options) == 0
    return folder


@pytest.fixture(scope="module")
def document(folder):
    return json.loads((folder / "latency.json").read_text())


def test_json_says_what_was_measured_where(document):
    assert document["benchmark"] == "latency"
    assert document["workload"] == {
        "model": R50,
        "device": "cpu",
        "dtypes": ["float32"],
        "clip": [1, 3, 32, 32, 32],
        "views": 30,
        "tolerance": {"float32": 1e-4},
    }
    environment = document["environment"]
    assert environment["torch"] == torch.__version__
    assert {"machine", "cores", "threads", "system", "python", "slowfast_ext", "commit"} < set(environment)
    assert document["kernels_unavailable"]
    assert document["roofline"]["float32"]["macs"] > 0
    assert document["roofline"]["float32"]["floor_ms"] is None


def test_json_has_every_sample_and_numbers_that_follow_from_them(document):
    assert [row["name"] for row in document["variants"]] == ["eager", "eager_channels_last", "accelerate", "engine"]
    eager = document["variants"][0]["median_ms"]
    best_plain = min(row["median_ms"] for row in document["variants"][:2])
    for row in document["variants"]:
        assert row["status"] == "timed"
        assert row["reason"] is None
        assert row["relative_error"] < 1e-4
        assert len(row["samples_ms"]) == 2
        assert row["median_ms"] == pytest.approx(sum(row["samples_ms"]) / 2)
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["clips_per_second"] == pytest.approx(1e3 / row["median_ms"])
        assert row["videos_per_second"] == pytest.approx(row["clips_per_second"] / 30)
        assert row["speedup_over_best_plain"] == pytest.approx(best_plain / row["median_ms"])
        assert row["speedup_over_eager_float32"] == pytest.approx(eager / row["median_ms"])
        assert row["dtype"] == "float32"
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] >= 0
    # Backbone, stems, laterals, blocks, head.
    assert sum(document["variants"][2]["blocks"].values()) == 1 + 2 + 4 + 16 + 1
    # The clip, stems, laterals, the blocks' convolutions (8 of 16 have one in the shortcut, less one), the head.
    assert sum(document["variants"][3]["blocks"].values()) == 1 + 2 + 4 + 32 + 7 + 1


def test_only_the_asked_for_files_are_left(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["latency.json", "latency.png"]
    assert (folder / "latency.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_processes_of_their_own_have_their_samples_in_one_document(capsys, tmp_path):
    status, text = run(capsys, "--variants", "eager", "--processes", "2", "--json", str(tmp_path / "latency.json"))
    document = json.loads((tmp_path / "latency.json").read_text())
    (row,) = document["variants"]
    assert (status, document["processes"], len(row["samples_ms"])) == (0, 2, 4)
    assert document["environment"]["threads"] == 1  # as here
    assert "eager in float32: medians of the processes " in text
    assert "4 rounds in 2 processes in shuffled order" in text


def test_the_table_has_a_row_a_variant_and_says_that_no_gpu_was_measured(document):
    lines = latency.format_report(document).splitlines()
    assert document["environment"]["machine"] in lines[0]
    assert R50 in lines[1]
    header, rule, *rows = lines[3:9]
    assert [row.split()[0] for row in rows] == ["eager", "eager_channels_last", "accelerate", "engine"]
    assert all(len(line) <= len(rule) for line in (header, *rows))
    assert "no GPU figure was measured" in lines[-1]


def test_batch_and_views_scale_the_rates(capsys, tmp_path):
    path = tmp_path / "two.json"
    run(capsys, "--variants", "eager", "--batch", "2", "--views", "5", "--json", str(path))
    (row,) = json.loads(path.read_text())["variants"]
    assert row["clips_per_second"] == pytest.approx(2e3 / row["median_ms"])
    assert row["videos_per_second"] == pytest.approx(row["clips_per_second"] / 5)


def test_a_variant_that_drops_one_branch_is_wrong_and_not_timed(capsys, monkeypatch, tmp_path):
    def drop_a_branch(model):
        norm = model.backbone.slow_path.layer3[1].last_norm
        norm.weight.zero_()
        norm.bias.zero_()
        return model

    monkeypatch.setattr(slowfast_ext, "accelerate", drop_a_branch)
    path = tmp_path / "wrong.json"
    status, screen = run(capsys, "--variants", "eager,accelerate", "--json", str(path))
    eager, ours = json.loads(path.read_text())["variants"]
    assert status == 1
    assert eager["status"] == "timed"
    assert ours["status"] == "wrong"
    assert ours["samples_ms"] == []
    assert "median_ms" not in ours
    assert ours["relative_error"] > latency.tolerance(torch.bfloat16, torch.device("cpu"))
    assert "accelerate in float32 wrong, not timed: relative error" in screen


def test_nan_is_wrong(capsys, monkeypatch):
    def poison(model):
        model.head.fc_cls.bias.fill_(float("nan"))
        return model

    monkeypatch.setattr(slowfast_ext, "accelerate", poison)
    status, screen = run(capsys, "--variants", "eager,accelerate")
    assert status == 1
    assert "accelerate in float32 wrong, not timed" in screen


def test_a_variant_that_cannot_run_is_named_with_its_reason_and_the_others_are_timed(capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no working C++ compiler\nand a long explanation\nof it")

    monkeypatch.setattr(torch, "compile", refuse)
    options = [option for option in TINY if option != "--no-compile"]
    status = latency.main([*options, "--variants", "compile_freezing,eager"])
    screen = capsys.readouterr().out
    assert status == 0
    assert (
        "compile_freezing in float32 failed, not timed: RuntimeError: no working C++ compiler and a long explanation"
        in screen
    )
    assert "of it" not in screen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "slowfast_r50_4x16x1"], "did you mean slowfast_r50_"),
        (["--crop", "31"], "--crop must be at least 32, got 31"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--views", "0"], "--views must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--seconds", "1", "--rounds", "1"], "--rounds and --seconds exclude each other"),
        (["--variants", "eager,turbo"], "got 'turbo'"),
        (["--variants", "compile", "--no-compile"], "--variants must name one without torch.compile"),
        (["--variants", "autocast_channels_last"], "needs bfloat16 or float16, got float32"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:999"], "--device must be"),
        (["--dtype", "float32,int8"], "--dtype must be of float32, bfloat16, float16, got 'int8'"),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--json", "no/such/folder/a.json"], "--json must be in an existing folder, got no/such/folder/a.json"),
        (["--plot", "no/such/folder/a.png"], "--plot must be in an existing folder, got no/such/folder/a.png"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message, capsys, monkeypatch):
    monkeypatch.setattr(latency, "measure", lambda options: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as stopped:
        latency.main(["--device", "cpu", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("slower", "refusal"), [(1.5, None), (90, "must be one that this CPU computes in hardware, got bfloat16")]
)
def test_a_type_that_the_cpu_emulates_is_refused(slower, refusal, monkeypatch):
    times = iter([slower] * 4 + [1.0] * 4)
    monkeypatch.setattr(latency, "time_once", lambda call, device: next(times))
    if refusal is None:
        latency.check_dtype("bfloat16", torch.device("cpu"))
    else:
        with pytest.raises(ValueError, match=refusal):
            latency.check_dtype("bfloat16", torch.device("cpu"))


def test_a_type_without_convolutions_is_refused(monkeypatch):
    def unsupported(*args, **kwargs):
        raise RuntimeError('"slow_conv3d" not implemented for Half')

    monkeypatch.setattr(torch, "conv3d", unsupported)
    with pytest.raises(ValueError, match="--dtype must be one that cpu supports, got float16"):
        latency.check_dtype("float16", torch.device("cpu"))


def test_a_missing_matplotlib_is_noticed_before_any_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        latency.main([*TINY, "--plot", str(tmp_path / "a.png")])
    assert "--plot needs matplotlib, which is not installed" in capsys.readouterr().err


def test_default_variants_depend_on_the_device_and_on_openvino(monkeypatch):
    def names(device, *dtypes):
        options = latency.argparse.Namespace(
            variants=None, no_compile=False, device=torch.device(device), dtypes=list(dtypes)
        )
        return latency.choose_variants(options)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    in_float32 = ["eager", "eager_channels_last", "compile_freezing", "accelerate", "engine"]
    assert [name for name, _ in names("cpu", "float32")] == in_float32
    both = names("cpu", "float32", "bfloat16")
    assert [name for name, dtype in both if dtype == "float32"] == in_float32
    assert {name for name, dtype in both if dtype == "bfloat16"} == {*in_float32, "autocast_channels_last"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert {name for name, _ in names("cpu", "float32")} == {*in_float32, "openvino", "engine_torch_alone"}
    on_gpu = {name for name, _ in names("cuda", "bfloat16")}
    assert on_gpu == set(VARIANTS) - {
        "compile_max_autotune",
        "torchscript",
        "onnxruntime",
        "openvino",
        "engine_torch_alone",
    }


@pytest.mark.parametrize("name", ["torchscript", "onnxruntime", "openvino"])
def test_another_runtime_is_timed(name, capsys, tmp_path):
    if name != "torchscript":
        pytest.importorskip(name, reason=f"{name} is of an optional extra and not installed; the extra 'test' has it")
    status, text = run(capsys, "--variants", name, "--json", str(tmp_path / "a.json"))
    (row,) = json.loads((tmp_path / "a.json").read_text())["variants"]
    assert (status, row["status"]) == (0, "timed"), text


def test_a_variant_is_run_in_the_types_that_it_has():
    options = argparse.Namespace(variants="torchscript,eager", dtypes=["float32", "bfloat16"], no_compile=False)
    assert latency.choose_variants(options) == [("torchscript", "float32"), ("eager", "float32"), ("eager", "bfloat16")]
    options.dtypes = ["bfloat16"]
    with pytest.raises(ValueError, match="must suit --dtype: torchscript needs float32, got bfloat16"):
        latency.choose_variants(options)


def test_what_fails_in_a_process_of_its_own_is_told_here():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: integer division or modulo by zero"):
        Isolated(divmod, (1, 0))


def test_a_package_can_be_left_out_of_a_process(capfd):
    with pytest.raises(RuntimeError, match=r"ModuleNotFoundError.*matplotlib"):
        Isolated(importlib.import_module, ("matplotlib.pyplot",), without=("matplotlib",))


def test_no_two_variants_compile_with_equal_options():
    # Dynamo would run the first one's code for both; seen with freezing, which was then timed without it.
    options = [variant.compile for variant in VARIANTS.values() if variant.compile is not None]
    assert all(options.count(one) == 1 for one in options)


def test_a_busy_machine_is_mentioned(document):
    def report_with(**environment):
        return latency.format_report(document | {"environment": document["environment"] | environment})

    assert "provisional" not in report_with(load_before=0.3, cores=2)
    assert "provisional" not in report_with(load_before=None)  # the system does not tell
    assert "the load average before was 3.0 on 2 cores" in report_with(load_before=3.0, cores=2)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    report.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        report.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_network_is_reproducible_and_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    first, second = create_network(R50), create_network(R50)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not first.training
    for (name, one), two in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert min(float(block.last_norm.weight.min()) for block in first.backbone.slow_path.layer4) > 0


def test_the_script_runs_from_any_folder(tmp_path):
    script = Path(latency.__file__)
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--no-compile" in done.stdout


@pytest.mark.cuda
def test_a_gpu_run_has_the_fraction_of_the_roofline(capsys, tmp_path):
    path = tmp_path / "gpu.json"
    options = [
        "--device",
        "cuda",
        "--dtype",
        "bfloat16",
        "--crop",
        "64",
        "--batch",
        "2",
        "--rounds",
        "3",
        "--no-compile",
    ]
    assert latency.main([*options, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["roofline"]["bfloat16"]["floor_ms"] > 0
    for row in document["variants"]:
        assert row["status"] == "timed"
        assert row["peak_memory_bytes"] > 0
        assert row["roofline_fraction"] > 0
    assert "of roofline" in capsys.readouterr().out
