"""Lists of videos with their labels, in mmaction2's text and JSON forms."""

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Entry:
    """One video of a list.

    Attributes:
        path: of the video file or the folder of frames, relative to the root of the data.
        labels: class numbers, at least one.
        num_frames: of a folder of frames; None for a video file.
        offset: frames of the folder that come before the video.
        position: line of the text file, or place in the JSON list; both count from 1.
    """

    path: str
    labels: tuple[int, ...]
    num_frames: int | None
    offset: int
    position: int


def read_annotations(
    path: str | os.PathLike,
    *,
    raw_frames: bool = False,
    with_offset: bool = False,
    multi_label: bool = True,
    num_classes: int | None = None,
) -> list[Entry]:
    """Read a list of videos, or of folders of frames.

    Text, one video a line, fields separated by white space (paths hold none), empty lines allowed::

        path label [label ...]                          video files
        path total_frames label [label ...]             folders of frames
        path offset total_frames label [label ...]      folders of frames, with_offset

    JSON (a name that ends in ``.json``): a list of objects with ``filename`` (video files) or ``frame_dir`` and
    ``total_frames`` (folders, and ``offset`` with_offset), and ``label``, a number or a list of numbers.

    Args:
        path: of the list, UTF-8.
        raw_frames: the list names folders of frames.
        with_offset: its lines give an offset as well; needs raw_frames.
        multi_label: a video may have more than one label.
        num_classes: labels must be below this number.

    Raises:
        ValueError: the list is empty or malformed, or a number is out of range. The message names file, line and value.
        OSError: the file cannot be read.
    """
    if with_offset and not raw_frames:
        raise ValueError("read_annotations: with_offset must be False for lists of video files, got True")
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the list must be UTF-8 text, got other bytes at position {error.start}") from error
    records = _json_records if path.suffix.lower() == ".json" else _text_records
    entries = []
    for place, position, (name, offset, num_frames, labels) in records(path, text, raw_frames, with_offset):
        if len(labels) > 1 and not multi_label:
            got = " ".join(map(str, labels))
            raise ValueError(f"{place}: the video must have one label unless multi_label is set, got {got}")
        entry = Entry(
            path=name,
            labels=tuple(_number(label, f"{place}: label", 0, num_classes) for label in labels),
            num_frames=_number(num_frames, f"{place}: total_frames", 1) if raw_frames else None,
            offset=_number(offset, f"{place}: offset", 0),
            position=position,
        )
        entries.append(entry)
    if not entries:
        raise ValueError(f"{path}: the list must name at least one video, got none")
    return entries


def _text_records(path, text, raw_frames, with_offset):
    names = ["path"] + ["offset"] * with_offset + ["total_frames"] * raw_frames
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        place = f"{path}, line {number}"
        if len(fields) <= len(names):
            raise ValueError(f"{place}: the line must be '{' '.join(names)} label [label ...]', got {line.strip()!r}")
        given = dict(zip(names, fields, strict=False))
        record = given["path"], given.get("offset", 0), given.get("total_frames"), fields[len(names) :]
        yield place, number, record


def _json_records(path, text, raw_frames, with_offset):
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: the file must be JSON, got an error: {error.msg}") from error
    if not isinstance(items, list):
        raise ValueError(f"{path}: the file must hold a list, got {type(items).__name__}")
    needed = ["frame_dir" if raw_frames else "filename", "label"]
    needed += ["total_frames"] * raw_frames + ["offset"] * with_offset
    for number, item in enumerate(items, start=1):
        place = f"{path}, entry {number}"
        if not isinstance(item, dict) or not item.keys() >= set(needed):
            raise ValueError(f"{place}: the entry must be an object with {', '.join(needed)}, got {item!r}")
        name, labels = item[needed[0]], item["label"]
        if not isinstance(name, str):
            raise ValueError(f"{place}: {needed[0]} must be a string, got {name!r}")
        labels = labels if isinstance(labels, list) else [labels]
        if not labels:
            raise ValueError(f"{place}: label must hold at least one number, got []")
        yield place, number, (name, item["offset"] if with_offset else 0, item.get("total_frames"), labels)


def _number(value: str | int, what: str, least: int, limit: int | None = None) -> int:
    """``value`` as an int in [least, limit)."""
    try:
        if isinstance(value, bool | float) or value is None:
            raise ValueError
        number = int(value)
    except (TypeError, ValueError):
        hint = " (a path must hold no white space)" if isinstance(value, str) else ""
        raise ValueError(f"{what} must be a whole number{hint}, got {value!r}") from None
    if number < least or (limit is not None and number >= limit):
        expected = f"at least {least}" if limit is None else f"in [{least}, {limit})"
        raise ValueError(f"{what} must be {expected}, got {number}")
    return number
