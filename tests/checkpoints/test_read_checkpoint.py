"""Files from outside: every kind of damage is named, and nothing in them runs."""

import os
import pickle
import struct
import sys
import types
from collections import OrderedDict

import numpy
import pytest
import torch
from small_networks import lively_model, small_config

import slowfast_ext
from slowfast_ext.checkpoints.read import read_checkpoint

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@pytest.fixture(scope="module")
def model():
    return lively_model(small_config(18, 18))


class Payload:
    """A pickle of this runs a command when it is read carelessly."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def foreign_objects():
    """What mmengine leaves beside the weights: an object of its own with a NumPy array, and a dictionary subclass."""
    module = types.ModuleType("foreign_engine")

    class HistoryBuffer:
        def __init__(self):
            self.history = numpy.arange(3.0)
            self.methods = [getattr, len]

        def __setstate__(self, state):
            raise AssertionError("foreign code was run")

    class ConfigDict(dict):
        def __setitem__(self, key, value):
            raise AssertionError("foreign code was run")

    for kind in (HistoryBuffer, ConfigDict):
        kind.__module__, kind.__qualname__ = "foreign_engine", kind.__name__
        setattr(module, kind.__name__, kind)
    sys.modules["foreign_engine"] = module
    yield {
        "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer()), "info": ConfigDict({"epoch": 3})},
        "best_score": numpy.float64(0.75),
    }
    sys.modules.pop("foreign_engine", None)


@FORMATS
def test_foreign_objects_stay_inert_and_weights_load(model, foreign_objects, tmp_path, zipped):
    path = tmp_path / "epoch.pth"
    transposed = torch.arange(6.0).reshape(2, 3).t()
    content = {
        "state_dict": {**model.state_dict(), "view": transposed},
        "optimizer": {"parameter": torch.nn.Parameter(torch.ones(2))},
    }
    torch.save({**content, **foreign_objects, "meta": {"epoch": 3}}, path, _use_new_zipfile_serialization=zipped)
    del sys.modules["foreign_engine"]
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)

    loaded = slowfast_ext.load_checkpoint(path)
    assert "foreign_engine" not in sys.modules
    assert all(value.equal(model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.load_report.unexpected == ["view"]
    assert any("foreign_engine.HistoryBuffer" in note for note in loaded.load_report.notes)
    file = read_checkpoint(path)
    assert file.tensors["view"].equal(transposed)
    assert file.extras["meta"] == {"epoch": 3}


@FORMATS
def test_half_precision_and_empty_tensors_survive(foreign_objects, tmp_path, zipped):
    tensors = {"half": torch.randn(4).half(), "bfloat": torch.randn(2, 2).bfloat16(), "empty": torch.zeros(0, 3)}
    tensors["integers"] = torch.arange(4)[1::2]
    torch.save({"state_dict": tensors, **foreign_objects}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "a.pth").tensors
    assert all(read[name].equal(value) and read[name].dtype == value.dtype for name, value in tensors.items())


@FORMATS
def test_malicious_torch_file_does_not_run(model, tmp_path, zipped):
    content = {"state_dict": model.state_dict(), "meta": Payload(tmp_path / "trace")}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    loaded = slowfast_ext.load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "trace").exists()
    assert any(f"{os.system.__module__}.system" in note for note in loaded.load_report.notes)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_malicious_pickle_does_not_run(tmp_path, protocol):
    content = {"blobs": {"conv1_w": numpy.zeros(3, "f4")}, "more": [Payload(tmp_path / "trace")]}
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content, protocol))
    assert list(read_checkpoint(tmp_path / "evil.pkl").tensors) == ["conv1_w"]
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "trace"), protocol))
    with pytest.raises(ValueError, match="is not a checkpoint"):
        read_checkpoint(tmp_path / "evil.pkl")
    assert not (tmp_path / "trace").exists()


def test_malicious_pickle_would_run_without_care(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_a_pickle_are_read(tmp_path, protocol):
    blobs = {
        "weights": numpy.arange(6, dtype="f4").reshape(1, 2, 3),
        "transposed": numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)),
        "steps": numpy.arange(3),
        "empty": numpy.zeros((0, 2), "f4"),
    }
    objects = {"objects": numpy.array([{}], dtype=object), "number": numpy.float64(1), "text": "name"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": {**blobs, **objects}}, protocol))
    tensors = read_checkpoint(tmp_path / "a.pkl").tensors
    assert set(tensors) == set(blobs)
    for name, array in blobs.items():
        assert tensors[name].numpy().dtype == array.dtype
        assert numpy.array_equal(tensors[name].numpy(), array)


def test_pickle_of_python_2_is_read(tmp_path):
    # What Python 2 wrote: the array's bytes as a string of protocol 2.
    data = struct.pack("<2f", 1.5, -200.25)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x02tcnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U"
        + bytes([len(data)])
        + data
        + b"tb"
    )
    (tmp_path / "old.pkl").write_bytes(b"\x80\x02}U\x05blobs}U\x06conv1_" + array + b"ss.")
    assert read_checkpoint(tmp_path / "old.pkl").tensors["conv1_"].tolist() == [1.5, -200.25]


def test_big_endian_arrays_are_named(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": {"w": numpy.zeros(2, ">f4")}}, 2))
    with pytest.raises(ValueError, match="big-endian"):
        read_checkpoint(tmp_path / "a.pkl")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be an existing file, got .*nothing\.pth"):
        slowfast_ext.load_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match="existing file"):
        slowfast_ext.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<html>404</html>", "is not a checkpoint but text, .*<!DOCTYPE html>"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is not a checkpoint$"),
        (b"PK\x03\x04 no archive at all", "truncated or damaged"),
        (b"\x80\x02}q\x00", "truncated or damaged"),
        (struct.pack("<Q", 10) + b"{not json]" + b"\0" * 40, "truncated or damaged"),
        (pickle.dumps([1, 2, 3]), "must hold a dictionary, got list"),
        (pickle.dumps({"epoch": 3, "names": ["a"]}), r"must hold named tensors, got the entries \['epoch', 'names'\]"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, message):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        slowfast_ext.load_checkpoint(tmp_path / "file.pth")


@FORMATS
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("foreign", [False, True])
def test_truncated_torch_file_is_named(model, foreign_objects, tmp_path, zipped, kept, foreign):
    content = {"state_dict": model.state_dict(), **(foreign_objects if foreign else {})}
    torch.save(content, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"cut\.pth is truncated or damaged"):
        slowfast_ext.load_checkpoint(tmp_path / "cut.pth")


def test_storage_larger_than_the_file_is_refused_before_it_is_allocated(foreign_objects, tmp_path):
    path = tmp_path / "huge.pth"
    torch.save({"w": torch.zeros(70000), **foreign_objects}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    count = b"J" + struct.pack("<i", 70000)
    assert data.count(count) >= 1
    path.write_bytes(data.replace(count, b"J" + struct.pack("<i", 2**31 - 1)))
    with pytest.raises(ValueError, match="cannot be in"):
        read_checkpoint(path)


def test_view_outside_of_its_storage_is_refused(foreign_objects, tmp_path):
    path = tmp_path / "outside.pth"
    torch.save({"w": torch.zeros(8)[:7], **foreign_objects}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x07\x85") == 1  # the size, (7,)
    path.write_bytes(data.replace(b"K\x07\x85", b"K\x09\x85"))
    with pytest.raises(ValueError, match="out of bounds"):
        read_checkpoint(path)
