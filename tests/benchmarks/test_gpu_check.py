"""gpu_check.sh with stand-ins for everything that it runs: stages, outcomes, files, arguments."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import latency
import layers
import pytest
import training
import training_curves

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
SYSTEM = "/usr/bin:/bin"
NOTED = ("SLOWFAST_EXT_CUDA", "FAIL_WITHOUT_CUDA", "PYTORCH_NO_CUDA_MEMORY_CACHING")
BENCHMARKS = {"latency.py": latency, "layers.py": layers, "training.py": training}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
without_sanitizer = pytest.mark.skipif(
    shutil.which("compute-sanitizer", path=f"{SYSTEM}:/usr/local/cuda/bin") is not None,
    reason="compute-sanitizer is installed here",
)

# Notes each call with what matters of its environment; fails, hangs or talks where the arguments contain a word.
PYTHON = f"""#!/bin/bash
case $1 in
  -c) echo "$PURELIB"; exit ;;
  -) cat >/dev/null; echo 'torch     2.11.0, CUDA 13.0'; exit ;;
esac
for name in {" ".join(NOTED)}; do
  [[ -z ${{!name}} ]] || printf '%s=%s ' "$name" "${{!name}}" >>"$CALLS"
done
printf '%q ' python "$@" >>"$CALLS"
echo >>"$CALLS"
echo "ran $*"
[[ -z $LOUD || $* != *$LOUD* ]] || {{ echo first; head -c 17000000 /dev/zero; echo last; }}
[[ -z $HANG || $* != *$HANG* ]] || sleep 60
[[ -z $FAIL || $* != *$FAIL* ]] || exit 7
"""
SANITIZER = """#!/bin/bash
printf '%q ' sanitizer "$@" >>"$CALLS"
echo >>"$CALLS"
while [[ $1 != python ]]; do shift; done
exec "$@"
"""


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A PATH with the stand-ins, and what a run of the script left."""

    def __init__(self, folder):
        self.folder, self.out, self.log = folder, folder / "out", folder / "calls"
        write_program(folder / "bin" / "python", PYTHON)
        write_program(folder / "bin" / "nvidia-smi", "#!/bin/bash\necho 'a GPU'\n")

    def install_sanitizer(self, path="bin"):
        write_program(self.folder / path / "compute-sanitizer", SANITIZER)

    def run(self, *arguments, **environment):
        environment = {
            "PATH": f"{self.folder / 'bin'}:{SYSTEM}",
            "CALLS": str(self.log),
            "PURELIB": str(self.folder / "site-packages"),
        } | environment
        command = ["bash", str(SCRIPT), *map(str, arguments)]
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, errors="replace", timeout=120
        )

    @property
    def calls(self):
        """The argument lists of what was called, after the variables that were set for it."""
        return [shlex.split(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def summary(self):
        """Exit status and log file by stage."""
        header, *rows = (self.out / "summary.txt").read_text().splitlines()
        assert re.split(r"  +", header) == ["stage", "exit status", "seconds", "log file"]
        columns = [re.split(r"  +", row) for row in rows]
        assert all(re.fullmatch(r"\d+", seconds) for _, _, seconds, _ in columns)
        return {stage: (status, log) for stage, status, _, log in columns}


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def list_stages():
    return subprocess.run(["bash", str(SCRIPT), "--list"], capture_output=True, text=True, check=True).stdout.split()


def test_all_stages_run_without_a_choice_and_leave_flat_files(machine):
    machine.install_sanitizer()
    result = machine.run("out")
    assert result.returncode == 0, result.stdout
    stages = list_stages()
    assert machine.summary() == {stage: ("0", f"{stage}.log") for stage in stages}
    files = {path.name for path in machine.out.iterdir()}
    assert files == {f"{stage}.log" for stage in stages} | {"summary.txt", "environment.log"}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in files)
    assert result.stdout.endswith((machine.out / "summary.txt").read_text())


def test_every_model_type_and_batch_is_measured():
    models, dtypes, batches = ("r50_4x16", "r50_8x8", "r101_8x8"), ("bfloat16", "float16", "float32"), (1, 30)
    names = [f"{model}_{dtype}_batch{batch}" for model in models for dtype in dtypes for batch in batches]
    autotuned = [f"autotune_{model}_batch{batch}" for model in models for batch in batches]
    fixed = ["build", "test", "memcheck", "racecheck", "initcheck", "synccheck"]
    whole, parts = [f"latency_{name}" for name in names], [f"layers_{name}" for name in names]
    steps = [f"training_{model}_{dtype}_batch8" for model in models for dtype in dtypes]
    curves = [f"curves_{dtype}" for dtype in dtypes]
    graphs = [f"graphs_{model}_bfloat16_batch8" for model in models]
    assert list_stages() == [*fixed, *whole, *autotuned, *parts, *steps, *graphs, *curves]


def test_stages_are_chosen_by_name_and_pattern_in_their_own_order(machine):
    assert machine.run("out", "layers_r50_8x8_float*_batch1", "test").returncode == 0
    assert list(machine.summary()) == ["test", "layers_r50_8x8_float16_batch1", "layers_r50_8x8_float32_batch1"]
    assert len(machine.calls) == 3


@pytest.mark.parametrize(
    "stage",
    [
        *(f"{kind}_{model}_float16_batch30" for kind in ("latency", "layers") for model in ("r50_4x16", "r101_8x8")),
        "autotune_r50_8x8_batch1",
        "training_r101_8x8_float16_batch8",
        "graphs_r50_4x16_bfloat16_batch8",
    ],
)
def test_benchmarks_accept_the_options_that_they_get(stage, machine, monkeypatch):
    assert machine.run("out", stage).returncode == 0
    ((_, script, *options),) = machine.calls
    module = BENCHMARKS[Path(script).name]
    monkeypatch.setattr(module, "check_dtype", lambda name, device: None)
    options[options.index("cuda")] = "cpu"
    parsed = module.parse_options(options)
    assert f"_{re.search(r'r[0-9]+_[0-9]+x[0-9]+', stage)[0]}x1_" in parsed.model
    assert parsed.batch == int(stage.rpartition("batch")[2])
    assert parsed.dtype == ("bfloat16" if stage.startswith(("autotune", "graphs")) else "float16")
    assert parsed.json == machine.out / f"{stage}.json"
    assert parsed.rounds is None
    assert 0 < parsed.seconds < 120
    if stage.startswith("autotune"):
        assert ("compile_max_autotune", "bfloat16") in parsed.variants
    if stage.startswith("graphs"):
        assert "accelerate_graphs" in parsed.variants


def test_curves_accept_the_options_that_they_get(machine, monkeypatch):
    assert machine.run("out", "curves_float16").returncode == 0
    ((_, _, *options),) = machine.calls
    monkeypatch.setattr(training_curves, "check_dtype", lambda name, device: None)
    options[options.index("cuda")] = "cpu"
    parsed = training_curves.parse_options(options)
    assert (parsed.dtype, parsed.json) == ("float16", machine.out / "curves_float16.json")


def test_the_build_needs_no_network_and_fails_without_cuda(machine):
    (machine.folder / "my wheels").mkdir()
    assert machine.run("out", "build", WHEELS="my wheels").returncode == 0
    *_, install = machine.calls
    assert install[:2] == ["SLOWFAST_EXT_CUDA=1", "python"]
    assert install[-1] == "."
    assert "--no-build-isolation" in install
    for call in machine.calls:
        assert "--no-index" in call
        assert call[call.index("--find-links") + 1] == str(machine.folder / "my wheels")


def test_what_the_build_needs_is_asked_for_before_it(machine):
    assert machine.run("out", "build", FAIL="setuptools").returncode == 1
    assert len(machine.calls) == 1
    assert "--find-links" not in machine.calls[0]


def test_tests_fail_where_they_would_be_skipped(machine):
    assert machine.run("out", "test").returncode == 0
    (call,) = machine.calls
    assert call[:6] == ["FAIL_WITHOUT_CUDA=1", "python", "-m", "pytest", "-m", "cuda"]
    assert f"--junit-xml={machine.out}/test.xml" in call


@pytest.mark.parametrize("place", ["bin", "site-packages/nvidia/cu13/bin", "toolkit/bin"])
def test_the_sanitizer_is_found(place, machine):
    if place != "bin" and shutil.which("compute-sanitizer", path=f"{SYSTEM}:/usr/local/cuda/bin"):
        pytest.skip("another compute-sanitizer is found first here")
    machine.install_sanitizer(place)
    environment = {"CUDA_HOME": str(machine.folder / "toolkit")} if place.startswith("toolkit") else {}
    assert machine.run("out", "*check", **environment).returncode == 0
    tools = [call[call.index("--tool") + 1] for call in machine.calls[::2]]
    assert tools == ["memcheck", "racecheck", "initcheck", "synccheck"]
    for sanitizer, driver in zip(machine.calls[::2], machine.calls[1::2], strict=True):
        assert sanitizer[sanitizer.index("--error-exitcode") + 1] == "1"
        command = ["python", "benchmarks/check_operators.py", "--device", "cuda"]
        assert driver == ["PYTORCH_NO_CUDA_MEMORY_CACHING=1", *command]


@without_sanitizer
def test_a_missing_sanitizer_is_no_success_and_no_failure(machine):
    assert machine.run("out", "memcheck", "test").returncode == 3
    assert machine.summary() == {"test": ("0", "test.log"), "memcheck": ("not available", "memcheck.log")}
    assert machine.run("out", "memcheck", "test", FAIL="-m cuda").returncode == 1
    assert machine.run("out", "memcheck", "layers_r50_8x8_float16_batch1", FAIL="layers").returncode == 1


def test_a_failing_stage_does_not_hide_the_next(machine):
    result = machine.run("out", "test", "layers_r50_4x16_bfloat16_batch1", FAIL="-m cuda")
    assert result.returncode == 1
    assert [status for status, _ in machine.summary().values()] == ["7", "0"]
    assert "ran benchmarks/layers.py" in (machine.out / "layers_r50_4x16_bfloat16_batch1.log").read_text()


def test_a_stage_that_hangs_is_ended_and_the_next_runs(machine):
    stages = ("test", "layers_r50_4x16_bfloat16_batch1")
    assert machine.run("out", *stages, HANG="-m cuda", STAGE_SECONDS="3").returncode == 1
    assert [status for status, _ in machine.summary().values()] == ["124, timed out", "0"]


def test_the_time_of_a_stage_covers_all_its_commands(machine):
    assert machine.run("out", "build", HANG="setuptools", STAGE_SECONDS="2").returncode == 1
    assert len(machine.calls) == 1


def test_a_long_log_keeps_its_beginning_and_end(machine):
    assert machine.run("out", "test", LOUD="-m cuda").returncode == 0
    log = (machine.out / "test.log").read_bytes()
    assert 13_000_000 < len(log) < 16_000_000
    assert log.startswith(b"ran -m pytest")
    assert log.endswith(b"last\n")


def test_files_of_an_earlier_run_of_a_stage_are_not_taken_for_its_own(machine):
    machine.out.mkdir()
    stages = ("latency_r50_4x16_bfloat16_batch1", "latency_r50_4x16_bfloat16_batch30")
    for stage in stages:
        (machine.out / f"{stage}.json").write_text("{}")
    machine.run("out", stages[0], FAIL="latency")
    assert not (machine.out / f"{stages[0]}.json").exists()
    assert (machine.out / f"{stages[1]}.json").exists()


def test_the_environment_comes_first(machine):
    result = machine.run("out", "test")
    environment = (machine.out / "environment.log").read_text()
    assert result.stdout.startswith(environment)
    for line in ("commit    ", "torch     2.11.0, CUDA 13.0", "a GPU"):
        assert f"\n{line}" in environment


def test_a_copy_without_its_repository_is_told_its_commit(machine, monkeypatch):
    copied = machine.folder / "copy" / "benchmarks" / SCRIPT.name
    copied.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, copied)
    monkeypatch.setitem(globals(), "SCRIPT", copied)
    for commit, written in (({"COMMIT": "1fe27a1"}, "1fe27a1"), ({}, "unknown")):
        machine.run(machine.out, "test", **commit)
        assert f"\ncommit    {written}\n" in (machine.out / "environment.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "OUT_DIR must be a folder (see --help), got ''"),
        (["--unknown"], {}, "OUT_DIR must be a folder (see --help), got '--unknown'"),
        (["out", "test", "latency"], {}, "STAGE must be a name or pattern of those of --list, got 'latency'"),
        (["calls.txt/out", "test"], {}, "OUT_DIR must be a folder that can be made, got 'calls.txt/out'"),
        (["calls.txt", "test"], {}, "OUT_DIR must be a folder that can be made, got 'calls.txt'"),
        (["out", "test"], {"STAGE_SECONDS": "0"}, "STAGE_SECONDS must be a positive integer, got '0'"),
        (["out", "build"], {"WHEELS": "nowhere"}, "WHEELS must be a folder, got 'nowhere'"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, environment, message, machine):
    (machine.folder / "calls.txt").touch()
    result = machine.run(*arguments, **environment)
    assert result.returncode == 2
    assert result.stderr == f"gpu_check: {message}\n"
    assert result.stdout == ""
    assert machine.calls == []
    assert not machine.out.exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(machine):
    machine.out.mkdir(mode=0o500)
    result = machine.run("out", "test")
    assert result.returncode == 2
    assert result.stderr == "gpu_check: OUT_DIR must be a writable folder, got 'out'\n"
    assert machine.calls == []
