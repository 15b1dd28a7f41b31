"""Results that commands write, and numbers that they take."""

import argparse
import json
import os

from ..evaluation.files import written_then_renamed


def check_writable(option: str, path: str) -> None:
    """Raise ValueError unless ``path`` can become a file."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"{option} must be a file in an existing, writable folder, got '{path}'")


def write_text(path: str, text: str) -> None:
    """Write beside the target and rename, so that a reader never sees half a file."""
    with written_then_renamed(path) as temporary, open(temporary, "x", encoding="utf-8", newline="") as file:
        file.write(text)


def write_json(path: str, value: dict | list) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
