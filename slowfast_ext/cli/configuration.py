"""CONFIG, the configuration that commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..training import apply_overrides, read_config, zoo_config

CONFIG_HELP = "zoo name (see slowfast-ext zoo), or a .py or .json file with mmaction2's keys, read and never run"


def resolve(config: str, overrides: list[str]) -> tuple[dict[str, Any], str]:
    """A configuration with its overrides, and its name.

    A path that does not exist stands for the zoo's configuration of that name, as in
    ``configs/recognition/slowfast/<name>.py``.
    """
    path = Path(config)
    if path.suffix in (".py", ".json") and path.is_file():
        return apply_overrides(read_config(path), overrides), path.stem
    name = path.name.removesuffix(".py").replace("_perbn_", "_prebn_")
    return apply_overrides(zoo_config(name), overrides), name
