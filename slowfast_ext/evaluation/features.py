"""Pooled features of videos, and the files that hold them."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from ..models import SlowFastConfig
from .files import written_then_renamed

ORDERS = ("slow-fast", "fast-slow")
SUFFIXES = (".npz", ".npy", ".json", ".pkl")


def arrange_features(
    features: Tensor, config: SlowFastConfig, *, order: str = "slow-fast", mean: bool = True
) -> Tensor:
    """Features of one video as asked for.

    Args:
        features (Tensor[views, slow channels + fast channels]): as ``engine.features`` gives them.
        config: of the network.
        order: ``slow-fast``, or ``fast-slow``: that of the classifier's columns.
        mean: over the views.

    Returns:
        Tensor[channels] or, without ``mean``, Tensor[views, channels].
    """
    if order not in ORDERS:
        raise ValueError(f"arrange_features: order must be one of {', '.join(ORDERS)}, got {order!r}")
    if order == "fast-slow":
        features = features.roll(config.fast.channels[-1], 1)
    return features.mean(0) if mean else features


@dataclass
class FeatureTable:
    """Features of videos, one float32 array a video, all of one shape: (channels,) or (views, channels).

    Attributes:
        settings: what the features depend on, as JSON values; ``read`` gives it back.
        rows: array of each video by its path.
    """

    settings: dict
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, path: str | os.PathLike) -> None:
        """Write the rows in their order; an existing file is replaced when all is written.

        - ``.npz``: arrays ``paths`` (str), ``features`` (float32) and ``settings`` (str, JSON).
        - ``.json``, ``.pkl``: a dict with ``paths``, ``features`` and ``settings``.
        - ``.npy``: the features alone; the paths go into a text file beside it, one a line.
        """
        path = Path(path)
        paths = list(self.rows)
        features = np.stack(list(self.rows.values())) if paths else np.zeros((0, 0), np.float32)
        if path.suffix == ".npy":
            with written_then_renamed(path.with_suffix(".txt")) as temporary:
                temporary.write_text("".join(f"{name}\n" for name in paths), encoding="utf-8")
        with written_then_renamed(path) as temporary:
            if path.suffix == ".npz":
                np.savez(
                    temporary, paths=np.array(paths, np.str_), features=features, settings=json.dumps(self.settings)
                )
            elif path.suffix == ".npy":
                np.save(temporary, features)
            elif path.suffix == ".json":
                table = {"settings": self.settings, "paths": paths, "features": features.tolist()}
                temporary.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
            elif path.suffix == ".pkl":
                table = {"settings": self.settings, "paths": paths, "features": features}
                temporary.write_bytes(pickle.dumps(table))
            else:
                raise ValueError(f"features: the file must end in {', '.join(SUFFIXES)}, got '{path}'")

    @classmethod
    def read(cls, path: str | os.PathLike) -> FeatureTable:
        """What ``write`` wrote as ``.npz`` or ``.json``.

        Raises:
            ValueError: another suffix, or no such file of features.
        """
        path = Path(path)
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as file:
                    paths, features = file["paths"].tolist(), file["features"]
                    settings = json.loads(str(file["settings"]))
            elif path.suffix == ".json":
                table = json.loads(path.read_text(encoding="utf-8"))
                paths, settings = table["paths"], table["settings"]
                features = np.asarray(table["features"], np.float32)
            else:
                raise ValueError("it ends in neither .npz nor .json")
            return cls(settings, dict(zip(paths, features, strict=True)))
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"features: '{path}' must be a file of features, .npz or .json, got: {error}") from error
