"""A list of videos of any length through a network, as a stage of Ray Data, into Parquet files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..data import ViewPlan
from .extras import require_packages
from .features import arrange_features
from .files import written_then_renamed
from .inference import VideoResult, over_videos, prepare, video_probabilities, view_features

OUTPUTS = ("classes", "features")
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class ArchiveSettings:
    """What the rows of an archive depend on; a folder holds rows of one kind.

    Attributes:
        checkpoint: path of the weights, and config: zoo name or None; to tell archives apart.
        plan: views of each video.
        dtype: of the arithmetic: float32, bfloat16 or float16.
        output: ``classes``, or ``features``: pooled, mean over the views.
        order: of the features, as :func:`~slowfast_ext.evaluation.features.arrange_features`.
        top_k: classes of a row.
        labels: names of all classes, or None.
    """

    checkpoint: str
    config: str | None
    plan: ViewPlan
    dtype: str = "float32"
    output: str = "classes"
    order: str = "slow-fast"
    top_k: int = 5
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class WorkerOptions:
    """How the videos are shared out.

    Attributes:
        workers: copies of the network, one a GPU or, without GPUs, one for so many CPUs.
        cpus: that each reserves; it decodes as many videos at a time.
        gpus: that each reserves: 1, a share of one, or 0 to run on CPUs.
        videos_per_file: rows of one Parquet file; what is lost when a worker dies.
        decoder: as :func:`~slowfast_ext.data.open_video`.
        max_views: clips in one forward pass.
        engine: a prepared plan in the place of modules.
        accelerate: without an engine, fused operators in the place of plain modules.
    """

    workers: int = 1
    cpus: int = 1
    gpus: float = 0
    videos_per_file: int = 64
    decoder: str = "auto"
    max_views: int | None = None
    engine: bool = True
    accelerate: bool = True


def schema(output: str):
    """Columns of the Parquet files (:class:`pyarrow.Schema`): what a failed video has not is null."""
    import pyarrow

    columns = [("path", pyarrow.string()), ("error", pyarrow.string()), ("views", pyarrow.int32())]
    if output == "features":
        columns.append(("features", pyarrow.list_(pyarrow.float32())))
    else:
        columns += [
            ("classes", pyarrow.list_(pyarrow.int32())),
            ("labels", pyarrow.list_(pyarrow.string())),
            ("probabilities", pyarrow.list_(pyarrow.float32())),
        ]
    return pyarrow.schema(columns)


def open_archive(folder: str | os.PathLike, settings: ArchiveSettings) -> set[str]:
    """Make the folder, or check that it holds rows of these settings.

    Returns:
        The paths that have a row, failed ones included.

    Raises:
        ValueError: the folder holds something else.
    """
    require_packages("predict-archive", ("ray", "pyarrow"), "ray")
    from pyarrow import parquet

    folder = Path(folder)
    wanted = json.loads(json.dumps(asdict(settings)))
    if not folder.exists():
        folder.mkdir(parents=True)
    if not (folder / _SETTINGS).exists():
        if any(folder.iterdir()):
            raise ValueError(f"predict-archive: '{folder}' must be empty or an archive that was begun, got other files")
        with written_then_renamed(folder / _SETTINGS) as temporary:
            temporary.write_text(json.dumps(wanted, indent=2, ensure_ascii=False), encoding="utf-8")
        return set()
    found = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"predict-archive: the settings must be those that '{folder}' was begun with: "
                f"{name} was {found.get(name)}, got {value}"
            )
    done = set()
    for path in folder.glob("part-*.parquet"):
        done.update(parquet.read_table(path, columns=["path"]).column("path").to_pylist())
    return done


def run_archive(
    model: nn.Module, paths: Sequence[str], folder: str | os.PathLike, settings: ArchiveSettings, options: WorkerOptions
) -> Iterator[tuple[int, list[str]]]:
    """Run the videos through the network on the Ray cluster that is connected, or on this machine.

    Each worker takes ``videos_per_file`` videos at a time and writes them as one file under ``folder``, complete or not
    at all, named after what is in it: a task that Ray repeats replaces its own file.

    Args:
        model: the plain network, in evaluation mode on the CPU; workers get copies.
        paths: videos without a row, see :func:`open_archive`. All machines must see them and ``folder`` by these names.

    Yields:
        For each file that was written, how many videos are in it and the errors of those that failed.
    """
    require_packages("predict-archive", ("ray", "pyarrow"), "ray")
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    size = options.videos_per_file
    parts = [{"paths": list(paths[start : start + size])} for start in range(0, len(paths), size)]
    if not parts:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False  # the caller has its own
    model_reference = ray.put(model)  # held until the end: workers that die are started again with it
    results = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        _Worker,
        fn_constructor_args=(model_reference, os.path.abspath(folder), settings, options),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(options.workers, len(parts))),
        num_cpus=options.cpus,
        num_gpus=options.gpus or None,
    )
    for row in results.iter_rows():
        yield int(row["videos"]), list(row["errors"])


class _Worker:
    """One copy of the network: a stage of Ray Data that takes lists of paths and writes Parquet files."""

    def __init__(self, model, folder: str, settings: ArchiveSettings, options: WorkerOptions):
        import ray

        model = ray.get(model)
        self.settings, self.options, self.folder = settings, options, Path(folder)
        self.config = model.config
        self.engine = prepare(
            model,
            device=torch.device("cuda" if options.gpus else "cpu"),
            dtype=getattr(torch, settings.dtype),
            max_views=options.max_views,
            engine=options.engine,
            accelerate=options.accelerate,
        )
        if settings.output == "features":
            self.compute = self._features
        else:
            self.compute = partial(video_probabilities, self.engine)

    def _features(self, views) -> torch.Tensor:
        return arrange_features(view_features(self.engine, views), self.config, order=self.settings.order)

    def __call__(self, batch: dict) -> dict:
        import pyarrow
        from pyarrow import parquet

        counts, errors = [], []
        for paths in batch["paths"]:
            videos = over_videos(
                self.compute,
                list(paths),
                self.settings.plan,
                decoder=self.options.decoder,
                workers=self.options.cpus,
            )
            rows = [self._row(video) for video in videos]
            name = hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16]
            with written_then_renamed(self.folder / f"part-{name}.parquet") as temporary:
                parquet.write_table(pyarrow.Table.from_pylist(rows, schema(self.settings.output)), temporary)
            counts.append(len(rows))
            errors.append([row["error"] for row in rows if row["error"] is not None])
        return {"videos": counts, "errors": errors}

    def _row(self, video: VideoResult) -> dict:
        row = {"path": video.path, "error": video.error}
        if video.error is not None:
            return row
        row["views"] = video.views
        if self.settings.output == "features":
            return row | {"features": video.value.tolist()}
        best = video.value.topk(min(self.settings.top_k, len(video.value)))
        classes, labels = best.indices.tolist(), self.settings.labels
        return row | {
            "classes": classes,
            "labels": [labels[index] for index in classes] if labels else None,
            "probabilities": best.values.tolist(),
        }
