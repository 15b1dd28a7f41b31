"""``slowfast-ext test CONFIG CHECKPOINT``."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import slowfast_ext

from ..data import ClipDataset
from ..engine import InferenceEngine
from ..evaluation import METRICS, evaluate
from ..evaluation.inference import PlainEngine, fold_batch_norms, prepare
from ..evaluation.result_files import SUFFIXES, PartFile, check_suffix, write_results
from ..evaluation.testing import score_videos
from ..models import SlowFastRecognizer, build_model
from ..training import TrainingError, TrainingSettings, read_settings
from ..training.batches import make_dataset
from ..training.distributed import Processes, start_processes
from .arguments import DTYPES, add_engine_options, warn
from .configuration import CONFIG_HELP, resolve
from .files import check_writable, positive
from .mmaction2_options import add_metric_options, add_process_options, read_topk, refuse

_DESCRIPTION = """\
Test a network on data.test of its configuration (10 clips x 3 crops for Kinetics-400), on one device or under torchrun
on many, each video once:
  slowfast-ext test slowfast_r50_4x16x1_256e_kinetics400_rgb slowfast.pth --eval top_k_accuracy mean_class_accuracy \\
      --out result.json --average-clips prob
  torchrun --nproc-per-node 8 -m slowfast_ext test my_config.py runs/4x16/latest.pth --eval top_k_accuracy
An interrupted test goes on when the same command is given again: what is done lies beside OUT, in OUT.part0, ..., or in
the folder of --tmpdir.
"""
_EPILOG = """\
OUT is a list with the scores of each video, in the order of the data set: lists of numbers in .json, .yaml and .yml
(pip install 'slowfast-ext[yaml]'), float32 arrays in .pkl. With --average-clips none it has the scores of each view,
crop by crop, one after the other. A video that cannot be read has {"path": str, "error": str} in its place; it is named
on stderr and does not count in the metrics.

Metrics: top1_acc and top5_acc, the share of videos whose class is among the 1 or 5 highest scores (other numbers with
--eval-options topk=1,3);
mean_class_accuracy, the mean over the classes that occur in the list or among the predictions of the share of their
videos that is recognised.

CHECKPOINT may come from mmaction2, PySlowFast or pytorchvideo. The configuration says which clips are seen; frames of
the slow pathway, normalisation, pooling and the places of clips and crops are those of the code base of the weights.

Exit status: 0; 1 if a video could not be read or memory ran out; 2 if the arguments are wrong, before any work; 130
after Ctrl-C.
"""
# What a code base does in its own way, and the weights rely on.
_HABITS = ("frame_sampling", "normalization", "head_pooling")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "test",
        help="test a network",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="mmaction2, PySlowFast or pytorchvideo weights")
    parser.add_argument("--out", metavar="OUT", help=f"file to write the scores to: {', '.join(SUFFIXES)}")
    parser.add_argument(
        "--eval", nargs="+", default=[], choices=METRICS, metavar="METRIC", help=f"print these: {', '.join(METRICS)}"
    )
    add_metric_options(parser)
    parser.add_argument(
        "--average-clips",
        choices=("score", "prob", "none"),
        help="mean over the views of the scores, or of the probabilities; or no mean (default: as CONFIG says)",
    )
    parser.add_argument(
        "--max-testing-views",
        type=positive,
        metavar="N",
        help="views run at a time, as model.test_cfg.max_testing_views (default: as CONFIG says, else what fits)",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override the configuration, nested keys with dots: data.test.ann_file=list.txt",
    )
    add_process_options(parser)
    parser.add_argument(
        "--tmpdir", metavar="DIR", help="folder of what is done, made where it is not there (default: beside OUT)"
    )
    parser.add_argument(
        "--gpu-collect",
        action="store_true",
        help="gather the scores of the processes through their GPUs instead of the network: faster where each view has "
        "its own, and takes their memory",
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the arithmetic (default: float32)")
    parser.add_argument(
        "--fuse-conv-bn",
        action="store_true",
        help="fold batch norms into the convolutions before them; the engine and the fused modules always do, so this "
        "is for --no-accelerate",
    )
    parser.add_argument(
        "--engine", action="store_true", help="fail where the prepared plan, the default, cannot be; not go on without"
    )
    add_engine_options(parser)
    refuse(parser, "--options", "--onnx", "--tensorrt")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Test:
    """What to make of the scores of a test, and how to get them; the fields are the options of the command."""

    out: str | None = None
    metrics: Sequence[str] = ()
    topk: Sequence[int] = (1, 5)
    tmpdir: str | None = None
    gpu_collect: bool = False
    dtype: str = "float32"
    engine: bool = False
    no_engine: bool = False
    no_accelerate: bool = False
    fuse_conv_bn: bool = False
    command: str = "test"

    def check(self, settings: TrainingSettings) -> None:
        """Raise ValueError or OSError for what can be known to be wrong before anything is made."""
        if settings.test is None:
            raise ValueError("test: the configuration must have data.test, got none")
        if not self.out and not self.metrics:
            raise ValueError("test: at least one of --out and --eval must be given, got neither")
        if self.out:
            check_suffix("--out", self.out)
            check_writable("--out", self.out)
        if self.tmpdir and os.path.exists(self.tmpdir) and not os.access(os.path.join(self.tmpdir, ""), os.W_OK):
            raise ValueError(f"--tmpdir must be a writable folder, got '{self.tmpdir}'")
        if self.gpu_collect and not torch.cuda.is_available():
            raise ValueError("--gpu-collect must be given on a machine with GPUs, got it on one without")
        if self.engine and (self.no_engine or self.no_accelerate):
            raise ValueError("--engine must be given without --no-engine and --no-accelerate, got both")
        views = number_of_views(settings)
        if self.metrics and settings.model.average_clips is None and views > 1:
            raise ValueError(f"test: metrics must have one score a video, got average_clips none with {views} views")

    @property
    def parts(self) -> str | None:
        """What the files are named after from which an interrupted test goes on; None if there are none."""
        name = os.path.basename(self.out) if self.out else "scores"
        return os.path.join(self.tmpdir, name) if self.tmpdir else self.out


def run(args: argparse.Namespace) -> int:
    overrides = list(args.cfg_options)
    if args.average_clips:
        overrides.append(f"model.test_cfg.average_clips={args.average_clips}")
    if args.max_testing_views:
        overrides.append(f"model.test_cfg.max_testing_views={args.max_testing_views}")
    config, _ = resolve(args.config, overrides)
    settings = read_settings(config)
    test = Test(
        out=args.out,
        metrics=args.eval,
        topk=read_topk(args.eval_options, args.eval),
        tmpdir=args.tmpdir,
        gpu_collect=args.gpu_collect,
        dtype=args.dtype,
        engine=args.engine,
        no_engine=args.no_engine,
        no_accelerate=args.no_accelerate,
        fuse_conv_bn=args.fuse_conv_bn,
    )
    test.check(settings)
    if not os.path.isfile(args.checkpoint):
        raise FileNotFoundError(f"test: CHECKPOINT must be an existing file, got '{args.checkpoint}'")
    processes = start_processes(args.launcher)
    try:
        failed = run_test(test, settings, args.checkpoint, processes)
    except TrainingError as error:
        print(f"slowfast-ext test: error: {error}", file=sys.stderr)
        return 1
    processes.close()  # not after an error: the others may be waiting for this one, and it for them
    return int(failed > 0)


def number_of_views(settings: TrainingSettings) -> int:
    clip = settings.test.clip
    return clip.sampling.num_test_clips * clip.transform.num_crops


def run_test(test: Test, settings: TrainingSettings, checkpoint: str, processes: Processes) -> int:
    """Test a checkpoint; the main process writes and prints.

    Returns:
        how many videos could not be read.

    Raises:
        TrainingError: the test could not go on.
    """
    model, settings = _load(settings, checkpoint, test.command if processes.is_main else None)
    dataset = make_dataset(settings.test, settings.model.network.num_classes, 0)
    engine = _prepare(model, processes, test, settings)
    average = settings.model.average_clips
    part, done = None, {}
    if test.parts:
        os.makedirs(os.path.dirname(test.parts) or ".", exist_ok=True)
        part = PartFile(test.parts, processes.rank, _identity(test, settings, checkpoint, dataset, engine))
        for rows in processes.gather(part.read()):  # all have read before one begins
            done |= rows
        part.begin()
    left = [index for index in range(len(dataset)) if index not in done]
    mine = left[processes.rank :: processes.world_size]
    scored, errors = {}, {}
    try:
        with tqdm(
            total=len(dataset), initial=len(done), unit="video", disable=None if processes.is_main else True
        ) as progress:
            for video in score_videos(
                engine,
                dataset,
                mine,
                average=average,
                videos=settings.test_loader.videos_per_gpu,
                views=settings.model.max_testing_views,
                workers=settings.test_loader.workers_per_gpu,
            ):
                if video.error is None:
                    scored[video.index] = video.scores
                    if part:
                        part.add(video.index, video.scores)
                else:
                    errors[video.index] = video.error
                    message = f"'{dataset.path(video.index)}': {video.error}"
                    tqdm.write(f"slowfast-ext {test.command}: error: {message}", file=sys.stderr)
                progress.update(processes.world_size)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the views must fit the GPU's memory, got too many at a time: --max-testing-views"
        ) from error
    finally:
        if part:
            part.close()
    for rows, failures in processes.gather((scored, errors), through_gpus=test.gpu_collect):
        done |= rows
        errors |= failures
    if processes.is_main:
        if test.out:
            write_results(test.out, _entries(dataset, done, errors, number_of_views(settings), average))
            print(f"written: {test.out} ({len(dataset)} videos)")
        _print_metrics(test, dataset, done, errors)
    if part:
        processes.from_main(None)  # the results are written: the parts can go
        part.remove()
    return len(errors)


def _load(
    settings: TrainingSettings, checkpoint: str, command: str | None
) -> tuple[SlowFastRecognizer, TrainingSettings]:
    """The network of a configuration with every weight of a checkpoint, in evaluation mode; and the settings, with what
    the weights' code base does in its own way. Warnings go to stderr if there is a ``command`` that they are from."""
    network = dataclasses.replace(settings.model.network, normalization=settings.test.clip.normalization)
    model = _loaded(build_model(network), checkpoint)
    report = model.load_report
    if report.missing or report.mismatched:
        raise ValueError(f"test: '{checkpoint}' must hold all weights of the configured network, got {report}")
    notes = list(report.notes)
    foreign = report.source_format.startswith(("PySlowFast", "pytorchvideo"))
    habits = {name: value for name, value in report.differing.items() if foreign and name in _HABITS}
    if habits:
        network = dataclasses.replace(network, **habits)
        model = _loaded(build_model(network), checkpoint)
        notes = [*model.load_report.notes, f"as the weights are of {report.source_format}: {habits}"]
    clip = settings.test.clip
    if network.frame_sampling == "linspace":
        clip = dataclasses.replace(
            clip,
            sampling=dataclasses.replace(clip.sampling, protocol="pyslowfast"),
            transform=dataclasses.replace(clip.transform, protocol="pyslowfast"),
        )
    if command:
        warn(command, notes)
    return model.eval(), dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, network=network),
        test=dataclasses.replace(settings.test, clip=clip),
    )


def _loaded(model: SlowFastRecognizer, checkpoint: str) -> SlowFastRecognizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it repeats the report, which is looked at by the caller
        return slowfast_ext.load_checkpoint(checkpoint, model)


def _prepare(
    model: SlowFastRecognizer, processes: Processes, test: Test, settings: TrainingSettings
) -> PlainEngine | InferenceEngine:
    if test.fuse_conv_bn and test.no_accelerate:
        fold_batch_norms(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = prepare(
            model,
            device=processes.device,
            dtype=DTYPES[test.dtype],
            max_views=settings.model.max_testing_views,
            engine=not (test.no_engine or test.no_accelerate),
            accelerate=not test.no_accelerate,
        )
    messages = [str(warning.message) for warning in caught]
    if test.engine and not isinstance(engine, InferenceEngine):
        raise ValueError(f"--engine must be possible here, got {'; '.join(messages)}")
    if processes.is_main:
        warn(test.command, messages)
    return engine


def _identity(
    test: Test,
    settings: TrainingSettings,
    checkpoint: str,
    dataset: ClipDataset,
    engine: PlainEngine | InferenceEngine,
) -> dict[str, str]:
    """What the scores of a video depend on: a test goes on only from scores of the same."""
    return {
        "checkpoint": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
        "list": hashlib.sha256(repr((dataset.root, dataset.entries)).encode()).hexdigest(),
        "network": json.dumps(settings.model.network.to_dict()),
        "clips": repr((settings.test.clip.sampling, settings.test.clip.transform)),
        "average-clips": str(settings.model.average_clips),
        "dtype": test.dtype,
        "engine": f"{type(engine).__name__} {test.no_accelerate}",
    }


def _entries(
    dataset: ClipDataset, scores: dict[int, np.ndarray], errors: dict[int, str], views: int, average: str | None
) -> list[np.ndarray | dict[str, str]]:
    """The list of the result file."""
    entries = []
    for index in range(len(dataset)):
        if index in scores:
            entries += [scores[index]] if average else list(scores[index])
        else:
            entries += [{"path": dataset.path(index), "error": errors[index]}] * (1 if average else views)
    return entries


def _print_metrics(test: Test, dataset: ClipDataset, scores: dict[int, np.ndarray], errors: dict[int, str]) -> None:
    if errors:
        print(
            f"slowfast-ext {test.command}: warning: {len(errors)} of {len(dataset)} videos could not be read; "
            "they do not count in the metrics",
            file=sys.stderr,
        )
    if test.metrics and scores:
        indices = sorted(scores)
        table = torch.from_numpy(np.stack([scores[index].reshape(-1) for index in indices]))
        labels = torch.tensor([dataset.label(index) for index in indices])
        for name, value in evaluate(table, labels, test.metrics, topk=test.topk).items():
            print(f"{name}: {value:.4f}")
    sys.stdout.flush()
