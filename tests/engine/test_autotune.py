"""The fastest right candidate wins, once; the file of results survives damage and company."""

import json
import subprocess
import sys
import time

import pytest
import torch

from slowfast_ext.engine.autotune import Candidate, Tuner, cache_path

CPU = torch.device("cpu")
RIGHT = torch.arange(6.0)


def slow():
    time.sleep(0.003)
    return RIGHT


def wrong():
    return RIGHT + 1


def failing():
    raise RuntimeError("no kernel for this shape")


def candidates(**runs):
    return [Candidate(name, run) for name, run in runs.items()]


def tuner(tmp_path, **options):
    return Tuner(CPU, "versions", path=tmp_path / "cache" / "autotune.json", **options)


def choose(tuner, key="key", **runs):
    return tuner.choose(key, candidates(**runs), lambda: RIGHT, 1e-5)


def test_the_fastest_is_chosen_and_the_times_are_told(tmp_path):
    name, why = choose(tuner(tmp_path), slow=slow, fast=lambda: RIGHT)
    assert name == "fast"
    assert why.startswith("tuned: fast ")
    assert "slow" in why


def test_a_wrong_one_is_dropped_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="wrong is off by .* in key, allowed 1e-05; it is not used"):
        assert choose(tuner(tmp_path), slow=slow, wrong=wrong)[0] == "slow"


def test_nan_is_wrong(tmp_path):
    with pytest.warns(UserWarning, match="off by nan"):
        assert choose(tuner(tmp_path), slow=slow, nan=lambda: RIGHT * float("nan"))[0] == "slow"


def test_one_that_cannot_run_is_dropped(tmp_path):
    assert choose(tuner(tmp_path), slow=slow, failing=failing)[0] == "slow"


def test_no_right_candidate_is_an_error(tmp_path):
    with pytest.warns(UserWarning, match="off by"), pytest.raises(RuntimeError, match="no kernel computes key right"):
        choose(tuner(tmp_path), wrong=wrong, failing=failing)


def test_without_tuning_the_first_is_taken_and_nothing_runs(tmp_path):
    assert choose(tuner(tmp_path, enabled=False), first=failing, second=failing) == ("first", "not tuned")
    assert not (tmp_path / "cache").exists()


def test_results_are_kept_for_the_next_process(tmp_path):
    first = tuner(tmp_path)
    choose(first, slow=slow, fast=lambda: RIGHT)
    first.save()
    name, why = choose(tuner(tmp_path), slow=failing, fast=failing)  # neither may run again
    assert name == "fast"
    assert why.startswith("tuned before: ")


def test_results_of_other_versions_or_candidates_do_not_count(tmp_path):
    first = tuner(tmp_path)
    choose(first, slow=slow, fast=lambda: RIGHT)
    first.save()
    other = Tuner(CPU, "other versions", path=tmp_path / "cache" / "autotune.json")
    assert choose(other, slow=slow, fast=failing)[0] == "slow"
    assert choose(tuner(tmp_path), slow=slow, new=failing)[0] == "slow"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 0, "entries": {}}', '{"format": 1, "entries": [1]}', "\xff"]
)
def test_a_damaged_or_foreign_file_is_ignored_with_a_warning_and_replaced(tmp_path, content):
    path = tmp_path / "cache" / "autotune.json"
    path.parent.mkdir()
    path.write_bytes(content.encode("latin-1"))
    with pytest.warns(UserWarning, match="is ignored"):
        damaged = tuner(tmp_path)
    choose(damaged, slow=slow, fast=lambda: RIGHT)
    with pytest.warns(UserWarning, match="is ignored"):
        damaged.save()
    assert choose(tuner(tmp_path), slow=failing, fast=failing)[0] == "fast"


@pytest.mark.parametrize("entry", [3, {"kernel": "gone"}, {"kernel": "fast", "candidates": ["slow", "fast"]}])
def test_an_edited_entry_does_no_harm(tmp_path, entry):
    first = tuner(tmp_path)
    choose(first, slow=slow, fast=lambda: RIGHT)
    first.save()
    path = tmp_path / "cache" / "autotune.json"
    content = json.loads(path.read_text())
    (machine,) = content["entries"]
    content["entries"][machine]["key"] = entry
    path.write_text(json.dumps(content))
    assert choose(tuner(tmp_path), slow=slow, fast=lambda: RIGHT)[0] == "fast"


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="is ignored"):
        blocked = tuner(tmp_path)
    choose(blocked, slow=slow, fast=lambda: RIGHT)
    with pytest.warns(UserWarning, match="cannot be kept"):
        blocked.save()


def test_concurrent_processes_keep_each_others_results(tmp_path):
    program = (
        "import sys, torch, pathlib\n"
        "from slowfast_ext.engine.autotune import Candidate, Tuner\n"
        "x = torch.ones(2)\n"
        "for i in range(20):\n"
        "    tuner = Tuner(torch.device('cpu'), 'versions', path=pathlib.Path(sys.argv[1]))\n"
        "    both = [Candidate('a', lambda: x), Candidate('b', lambda: x)]\n"
        "    tuner.choose(f'{sys.argv[2]} {i}', both, lambda: x, 1e-5)\n"
        "    tuner.save()\n"
    )
    path = tmp_path / "autotune.json"
    runs = [subprocess.Popen([sys.executable, "-W", "error", "-c", program, path, name]) for name in ("one", "two")]
    assert [run.wait() for run in runs] == [0, 0]
    (known,) = json.loads(path.read_text())["entries"].values()
    assert len(known) == 40
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp"] == []


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SLOWFAST_EXT_CACHE", str(tmp_path))
    assert cache_path() == tmp_path / "autotune.json"
    monkeypatch.delenv("SLOWFAST_EXT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_path() == tmp_path / "xdg" / "slowfast_ext" / "autotune.json"
