"""The documents of several processes become one."""

import copy

import pytest
from summaries import pool, summarise


def document(**milliseconds):
    rows = [
        {
            "name": name,
            "dtype": "float32",
            "status": "timed",
            "reason": None,
            "relative_error": 1e-7,
            "prepare_seconds": 1.0,
            "peak_memory_bytes": 100,
            "blocks": {"steps in oneDNN": 9} if name == "engine" else None,
            "samples_ms": samples,
        }
        for name, samples in milliseconds.items()
    ]
    workload = {"clip": [2, 3, 32, 64, 64], "views": 10}
    return summarise(
        {"seconds": 2.0, "workload": workload, "roofline": {"float32": {"floor_ms": None}}, "variants": rows}
    )


def test_speed_ups_are_those_of_the_medians_over_all_processes():
    first = document(eager=[10.0, 10.0, 10.0], engine=[4.0, 5.0, 6.0])
    second = document(eager=[20.0, 20.0], engine=[6.0, 6.0])
    pooled = pool([first, second])
    eager, engine = pooled["variants"]
    assert engine["samples_ms"] == [4.0, 5.0, 6.0, 6.0, 6.0]
    assert engine["process_medians_ms"] == [5.0, 6.0]
    assert (engine["median_ms"], eager["median_ms"]) == (6.0, 10.0)
    assert engine["speedup_over_eager_float32"] == pytest.approx(10 / 6)
    assert engine["clips_per_second"] == pytest.approx(2e3 / 6)
    assert engine["blocks"] == {"steps in oneDNN": 9}
    assert (pooled["processes"], pooled["seconds"]) == (2, 4.0)


def test_errors_are_the_largest_and_memory_and_preparation_the_median():
    documents = [document(engine=[1.0]) for _ in range(3)]
    for each, error, seconds, peak in zip(documents, (1e-7, 3e-7, 2e-7), (5.0, 1.0, 2.0), (1, 9, 5), strict=True):
        each["variants"][0] |= {"relative_error": error, "prepare_seconds": seconds, "peak_memory_bytes": peak}
    (row,) = pool(documents)["variants"]
    assert (row["relative_error"], row["prepare_seconds"], row["peak_memory_bytes"]) == (3e-7, 2.0, 5)


def test_what_failed_in_one_process_has_no_times():
    first = document(eager=[10.0], engine=[5.0])
    second = copy.deepcopy(first)
    second["variants"][1] |= {"status": "failed", "reason": "no memory", "samples_ms": []}
    eager, engine = pool([first, second])["variants"]
    assert eager["median_ms"] == 10.0
    assert (engine["status"], engine["reason"], engine["samples_ms"]) == ("failed", "no memory", [])


def test_what_an_engine_chose_in_some_processes_only_is_counted():
    first, second = document(engine=[5.0]), document(engine=[5.0])
    second["variants"][0]["blocks"] = {"steps in OpenVINO": 9}
    assert pool([first, second])["variants"][0]["blocks"] == {
        "steps in oneDNN (in 1 of 2 processes)": 9,
        "steps in OpenVINO (in 1 of 2 processes)": 9,
    }
