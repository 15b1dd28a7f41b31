"""Files of test results: the finished ones, in mmaction2's form, and the parts of those that are not."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from .extras import require_packages
from .files import written_then_renamed

SUFFIXES = (".json", ".pkl", ".yaml", ".yml")
# What pickled NumPy arrays are made of, whichever NumPy wrote them. Nothing else is looked up in a file.
_PICKLED = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
}

# Scores of a video, or of one of its views: float32 array (num_classes,); or {"path": ..., "error": ...}.
Entry = np.ndarray | dict[str, str]


def check_suffix(option: str, path: str | os.PathLike) -> None:
    """Raise ValueError unless results can be in a file of this name, ImportError if YAML is wanted without PyYAML."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{option} must end in {' or '.join(SUFFIXES)}, got '{path}'")
    if _is_yaml(path):
        require_packages(f"{option} with the suffix {Path(path).suffix}", ("yaml",), "yaml")


def write_results(path: str | os.PathLike, entries: list[Entry]) -> None:
    """Write a list with the scores of each video in the order of the data set; a video that could not be read has
    ``{"path": ..., "error": ...}`` in its place. An existing file is replaced when all is written.

    ``.json``, ``.yaml`` and ``.yml`` have lists of numbers, ``.pkl`` float32 arrays.
    """
    check_suffix("results", path)
    with written_then_renamed(path) as temporary:
        if temporary.suffix == ".pkl":
            temporary.write_bytes(pickle.dumps(entries))
            return
        values = [dict(entry) if isinstance(entry, dict) else entry.tolist() for entry in entries]
        text = _to_yaml(values) if _is_yaml(path) else json.dumps(values, ensure_ascii=False)
        temporary.write_text(text, encoding="utf-8")


def read_results(path: str | os.PathLike) -> list[Entry]:
    """What :func:`write_results` wrote, or mmaction2's ``tools/test.py`` as JSON or pickle. Only arrays, lists, numbers
    and text are made; nothing that a pickle or a tag of YAML names is imported or called.

    Raises:
        ValueError: another suffix, or no such list.
        ImportError: YAML without PyYAML.
        OSError: the file cannot be read.
    """
    check_suffix("results", path)
    path = Path(path)
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                values = _ArraysOnly(file).load()
        else:
            text = path.read_text(encoding="utf-8")
            values = _from_yaml(text) if _is_yaml(path) else json.loads(text)
        if not isinstance(values, list) or not values:
            raise ValueError("no list of entries")
        entries = [value if _is_failure(value) else np.asarray(value, np.float32) for value in values]
        widths = {entry.shape for entry in entries if not isinstance(entry, dict)}
        if any(len(shape) != 1 for shape in widths) or len(widths) > 1:
            raise ValueError(f"entries with the shapes {sorted(widths)}")
    except OSError:
        raise
    except Exception as error:  # pickle, json and yaml have their own for each kind of damage
        raise ValueError(f"results: '{path}' must be a list of scores for each video, got {error}") from error
    return entries


def _is_failure(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"path", "error"}


def _is_yaml(path: str | os.PathLike) -> bool:
    return Path(path).suffix in (".yaml", ".yml")


def _to_yaml(values: list) -> str:
    """One line for each entry."""
    import yaml

    # libyaml, where PyYAML was built with it, is several times as fast on lists of this length.
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump(
        values, Dumper=dumper, default_flow_style=None, width=2**31 - 1, allow_unicode=True, sort_keys=False
    )


def _from_yaml(text: str) -> Any:
    import yaml

    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"an object of {module}.{name}")
        return super().find_class(module, name)


class PartFile:
    """Scores that a process has so far, one video a line, from which an interrupted test goes on.

    The file is ``<results>.part<rank>``, text: the settings as JSON, then ``{"index": ..., "scores": ...}`` lines.

    Args:
        results: path of the finished results, or another that the parts are to lie beside.
        rank: of the process.
        settings: what scores depend on, as JSON values.
    """

    def __init__(self, results: str | os.PathLike, rank: int, settings: dict[str, str]):
        self.results, self.settings = Path(results), settings
        self.path = Path(f"{results}.part{rank}")
        self._file = None

    def read(self) -> dict[int, np.ndarray]:
        """Scores by index, of all parts that lie beside the results, however many processes wrote them.

        Raises:
            ValueError: a part was written with other settings; the message names the first that differs.
        """
        rows: dict[int, np.ndarray] = {}
        for path in self._paths():
            rows |= self._rows(path)
        return rows

    def begin(self) -> None:
        """Open the part of this process, to go on behind the last whole line."""
        rows = self._rows(self.path) if self.path.exists() else {}
        with written_then_renamed(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.settings) + "\n")
            file.writelines(self._line(index, scores) for index, scores in rows.items())
        self._file = self.path.open("a", encoding="utf-8")

    def add(self, index: int, scores: np.ndarray) -> None:
        """Keep the scores of a video, whatever happens to this process afterwards."""
        self._file.write(self._line(index, scores))
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Delete all parts: the results are written."""
        for path in self._paths():
            path.unlink(missing_ok=True)

    def _rows(self, path: Path) -> dict[int, np.ndarray]:
        first, *lines = path.read_text(encoding="utf-8").split("\n")
        if not lines:  # killed before the first line was whole
            return {}
        written = json.loads(first)
        for name, value in self.settings.items():
            if written.get(name) != value:
                raise ValueError(
                    f"test: '{path}' must be of the same test to go on with it, got one with another {name}; "
                    "delete it to begin anew"
                )
        rows = map(json.loads, lines[:-1])  # the last one is empty, or cut short
        return {row["index"]: np.asarray(row["scores"], np.float32) for row in rows}

    def _paths(self) -> list[Path]:
        return sorted(
            path
            for path in self.results.parent.iterdir()
            if path.name.startswith(f"{self.results.name}.part")
            and path.name[len(self.results.name) + len(".part") :].isdigit()
        )

    @staticmethod
    def _line(index: int, scores: np.ndarray) -> str:
        return json.dumps({"index": index, "scores": scores.tolist()}) + "\n"
