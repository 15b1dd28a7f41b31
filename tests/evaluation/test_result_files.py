import importlib.util
import json
import os
import pickle

import numpy as np
import pytest

from slowfast_ext.evaluation.result_files import PartFile, read_results, write_results

ENTRIES = [np.float32([0.25, 1e-7]), {"path": "a.mp4", "error": "it is: ünlesbar"}, np.float32([1 / 3, 2 / 3])]


@pytest.mark.parametrize("suffix", [".json", ".pkl", ".yaml", ".yml"])
def test_results_are_read_as_they_were_written(tmp_path, suffix):
    if suffix in (".yaml", ".yml"):
        pytest.importorskip("yaml")
    path = tmp_path / f"r{suffix}"
    write_results(path, ENTRIES)
    for entry, read in zip(ENTRIES, read_results(path), strict=True):
        assert np.array_equal(entry, read) if isinstance(entry, np.ndarray) else entry == read
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


def test_a_yaml_file_has_a_line_for_each_entry_that_any_reader_of_numbers_understands(tmp_path):
    pytest.importorskip("yaml")
    failure = ENTRIES[1]
    write_results(tmp_path / "r.yaml", [np.float32(range(100)), failure, failure])
    first, *others = (tmp_path / "r.yaml").read_text(encoding="utf-8").splitlines()
    assert first == f"- [{', '.join(f'{number}.0' for number in range(100))}]"
    assert others == ["- {path: a.mp4, error: 'it is: ünlesbar'}"] * 2  # no reference from one to the other


def test_yaml_without_its_package_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for use in (lambda: write_results(tmp_path / "r.yaml", ENTRIES), lambda: read_results(tmp_path / "r.yaml")):
        with pytest.raises(ImportError, match=r"results .* needs yaml: pip install 'slowfast-ext\[yaml\]'"):
            use()


class _Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("r.pkl", pickle.dumps([_Harmful()]), "an object of posix.mkdir"),
        ("r.pkl", pickle.dumps(ENTRIES)[:-9], "pickle data was truncated|ran out of input"),
        ("r.json", b"[[1, 2], [3", "delimiter"),
        ("r.json", b"[]", "no list of entries"),
        ("r.json", b"[[1, 2], [3]]", r"entries with the shapes \[\(1,\), \(2,\)\]"),
        ("r.json", b'{"0": [1]}', "no list of entries"),
        ("r.yaml", b"- !!python/object/apply:os.mkdir [harm]", "could not determine a constructor"),
        ("r.yaml", b"- [1, 2\n- [", "expected"),
        ("r.txt", b"1 2", r"must end in .json or .pkl or .yaml or .yml"),
    ],
)
def test_other_files_are_refused_and_nothing_in_them_is_run(tmp_path, monkeypatch, name, content, reason):
    if name == "r.yaml":
        pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_results(name)
    assert not (tmp_path / "harm").exists()


def test_arrays_that_numpy_1_pickled_are_read(tmp_path):
    """It named its module numpy.core."""
    content = pickle.dumps(ENTRIES, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "r.pkl").write_bytes(content)
    assert np.array_equal(read_results(tmp_path / "r.pkl")[0], ENTRIES[0])


def test_parts_of_any_number_of_processes_are_put_together(tmp_path):
    for rank, index in ((0, 4), (1, 1), (10, 2)):
        part = PartFile(tmp_path / "r.json", rank, {"list": "a"})
        part.begin()
        part.add(index, np.float32([index, 1 / 3]))
        part.close()
    (tmp_path / "r.json.partial").write_text("of somebody else")
    part = PartFile(tmp_path / "r.json", 0, {"list": "a"})
    rows = part.read()
    assert sorted(rows) == [1, 2, 4]
    assert np.array_equal(rows[4], np.float32([4, 1 / 3]))
    part.begin()
    part.add(5, np.float32([5, 5]))
    part.close()
    assert json.loads(part.path.read_text().splitlines()[1])["index"] == 4
    part.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["r.json.partial"]
