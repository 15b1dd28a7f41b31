"""Read a checkpoint file of any of the known kinds without running anything that is in it."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

# First bytes of the file formats; torch's own format was a sequence of pickles before version 1.6.
_ZIP = b"PK\x03\x04"
_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLE = b"\x80"


@dataclass
class CheckpointFile:
    """What a file holds: named tensors under the names in the file, and everything beside them.

    Args:
        tensors: the weights.
        extras: the other entries of the outer dictionary (``meta``, ``cfg``, ...); metadata of a safetensors file.
        ignored: full names of classes and functions that the file refers to and that were not touched.
    """

    tensors: dict[str, Tensor]
    extras: dict[str, Any]
    ignored: list[str] = field(default_factory=list)


def read_checkpoint(path: str | os.PathLike) -> CheckpointFile:
    """Read ``path``, recognised by its content, onto the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty, truncated, damaged or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: path must be an existing file, got {str(path)!r}")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"load_checkpoint: {path} is empty")
    try:
        if head.startswith(_ZIP) or _LEGACY_TORCH in head[:16]:
            content, ignored = _read_torch(path, zipped=head.startswith(_ZIP))
            return _open_container(path, content, ignored)
        if head.startswith(_PICKLE):
            with path.open("rb") as file:
                unpickler = _InertUnpickler(file)
                return _open_container(path, unpickler.load(), unpickler.ignored)
        if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size:
            with safetensors.safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                return CheckpointFile(tensors, file.metadata() or {})
    except _NotACheckpointError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # every reader has its own idea of what to raise for damaged bytes
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"load_checkpoint: {path} is truncated or damaged ({reason})") from error
    raise ValueError(f"load_checkpoint: {path} is not a checkpoint{_guess(head)}")


class _NotACheckpointError(Exception):
    """The file was read, and is something else."""


def _guess(head: bytes) -> str:
    text = head[:64]
    if not text.isascii() or b"\0" in text:
        return ""
    return f" but text, perhaps an error page saved in its place: {text.decode().strip().splitlines()[:1]}"


def _open_container(path: Path, content: Any, ignored: list[str]) -> CheckpointFile:
    """Find the named tensors in what the file holds: under one of the known entries, or bare."""
    if not isinstance(content, dict):
        raise _NotACheckpointError(
            f"load_checkpoint: {path} is not a checkpoint: it must hold a dictionary, got {type(content).__name__}"
        )
    entry = next((name for name in ("state_dict", "model_state", "blobs") if isinstance(content.get(name), dict)), None)
    named = content if entry is None else content[entry]
    tensors = {str(name): value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise _NotACheckpointError(
            f"load_checkpoint: {path} is not a checkpoint: it must hold named tensors, got the entries "
            f"{[str(name) for name in content][:8]}"
        )
    extras = {} if entry is None else {str(name): value for name, value in content.items() if name != entry}
    return CheckpointFile(tensors, extras, sorted(set(ignored)))


def _read_torch(path: Path, zipped: bool) -> tuple[Any, list[str]]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True), []
    except pickle.UnpicklingError:
        # mmaction2 stores objects of its own beside the weights (message hub, NumPy scalars), which torch refuses.
        return _read_zipped(path) if zipped else _read_legacy(path)


def _read_zipped(path: Path) -> tuple[Any, list[str]]:
    """The format of torch 1.6 and later: a zip with one pickle, and one uncompressed file a storage."""
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it is big-endian")
        storages: dict[str, Tensor] = {}

        def load_storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            if key not in storages:
                data = bytearray(archive.read(f"{folder}data/{key}"))
                storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            return storages[key]

        with archive.open(pickled) as file:
            unpickler = _InertUnpickler(file, load_storage)
            return unpickler.load(), unpickler.ignored


def _read_legacy(path: Path) -> tuple[Any, list[str]]:
    """The older format: four pickles (magic number, version, system, content), the storage keys, then the storages."""
    storages: dict[str, Tensor] = {}
    size = path.stat().st_size

    def load_storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if count * dtype.itemsize > size:
            raise EOFError(f"a storage of {count} elements cannot be in {size} bytes")
        return storages.setdefault(key, torch.empty(count, dtype=dtype))

    with path.open("rb") as file:
        for _ in range(3):
            _InertUnpickler(file).load()
        unpickler = _InertUnpickler(file, load_storage)
        content = unpickler.load()
        for key in _InertUnpickler(file).load():
            count = struct.unpack("<q", file.read(8))[0]
            if count != storages[key].numel():
                raise ValueError("a storage has another size than its tensors need")
            data = bytearray(file.read(count * storages[key].element_size()))
            if count:
                storages[key].copy_(torch.frombuffer(data, dtype=storages[key].dtype))
    return content, unpickler.ignored


class _Inert:
    """Stands for every class and function that is not needed: takes any arguments and any state, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs):
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = _nothing


_NUMPY_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
}


class _Dtype:
    """In place of ``numpy.dtype``: the plain numbers that weights consist of."""

    def __init__(self, code: str, *args):
        self.torch = _NUMPY_DTYPES.get(code.lstrip("<|="))

    def __setstate__(self, state):
        if state[1] not in "<|=":
            raise ValueError("its arrays are big-endian")


def _as_tensor(shape: tuple[int, ...], dtype: _Dtype, fortran_order: bool, data: bytes | str) -> Tensor | None:
    """The state of a pickled NumPy array as a tensor; ``None`` if it holds no plain numbers."""
    if dtype.torch is None:
        return None
    data = bytearray(data.encode("latin1") if isinstance(data, str) else data)  # Python 2 wrote bytes as text
    flat = torch.frombuffer(data, dtype=dtype.torch) if data else torch.empty(0, dtype=dtype.torch)
    if fortran_order:
        return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    return flat.reshape(shape)


class _Array:
    """In place of ``numpy.ndarray`` while it is being built."""

    tensor: Tensor | None = None

    def __setstate__(self, state):
        self.tensor = _as_tensor(*state[-4:])


def _array_from_buffer(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    """How arrays are written since pickle protocol 5."""
    array = _Array()
    array.tensor = _as_tensor(shape, dtype, order == "F", data)
    return array


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest) -> Tensor:
    """``storage`` is flat; ``as_strided`` refuses to look outside of it."""
    return storage.as_strided(size, stride, offset)


_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}

# All that a pickle may name and get; everything else becomes an _Inert object.
_ALLOWED = {
    **_STORAGES,
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "numpy.core.multiarray._reconstruct": lambda *rest: _Array(),
    "numpy._core.multiarray._reconstruct": lambda *rest: _Array(),
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "numpy._core.numeric._frombuffer": _array_from_buffer,
    "numpy.dtype": _Dtype,
    "__builtin__.bytes": lambda *rest: b"",  # how protocol 2 writes empty bytes
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
}


class _InertUnpickler(pickle.Unpickler):
    """Builds containers, numbers, text and tensors; imports nothing and calls nothing that a file names."""

    def __init__(self, file, load_storage=None):
        super().__init__(file, encoding="latin1")
        self.ignored: list[str] = []
        self.load_storage = load_storage

    def find_class(self, module: str, name: str):
        full_name = f"{module}.{name}"
        if full_name not in _ALLOWED:
            self.ignored.append(full_name)
        return _ALLOWED.get(full_name, _Inert)

    def persistent_load(self, identifier):
        kind, dtype, key, _, count = identifier[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or self.load_storage is None:
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        return self.load_storage(dtype, key, count)

    def load(self):
        return _unwrap(super().load())


def _unwrap(value):
    """Arrays of a pickled dictionary as tensors, one level of nesting deep: ``{"blobs": {name: array}}``."""
    if not isinstance(value, dict):
        return value
    blobs = value.get("blobs", value)
    if isinstance(blobs, dict):
        for name, item in blobs.items():
            if isinstance(item, _Array):
                blobs[name] = item.tensor
    return value
