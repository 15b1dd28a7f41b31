"""``slowfast-ext train CONFIG``."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from ..evaluation import evaluate
from ..training import RunOptions, TrainingError, read_settings, starting_weights, train
from ..training.checkpoint_files import CheckpointFolder
from ..training.compilation import COMPILE_MODES
from ..training.distributed import Processes
from ..training.step import AMP_DTYPES
from .configuration import CONFIG_HELP, resolve
from .mmaction2_options import add_process_options, refuse
from .test import Test, run_test

_DESCRIPTION = """\
Train a network of the zoo, or one of your own configuration, on one device or under torchrun on many:
  slowfast-ext train slowfast_r50_4x16x1_256e_kinetics400_rgb --work-dir runs/4x16 --validate
  torchrun --nproc-per-node 8 -m slowfast_ext train my_config.py --resume-from auto --amp bf16
A run that was killed goes on with --resume-from auto as if nothing had happened. SIGTERM and Ctrl-C write a checkpoint
first.
"""
_EPILOG = """\
Written to the work dir: <config>.py, the configuration with all overrides; <time>.log; <time>.log.json, one JSON object
a line, first the run, then "mode" train or val; epoch_N.pth after N epochs and epoch_N_iter_M.pth within one;
latest.pth, a link; best_METRIC_epoch_N.pth; last_pred.pkl and best_pred.pkl, scores of --test-last and --test-best.

Exit status: 0, also after SIGTERM; 1 if the run could not go on (a loss that is not finite, lost data, a full disk at
the end) or a video of the test could not be read; 2 if the arguments are wrong, before any work; 130 after Ctrl-C.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a network",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help=CONFIG_HELP,
    )
    parser.add_argument("--work-dir", metavar="DIR", help="folder of the results (default: work_dirs/<config>)")
    parser.add_argument(
        "--resume-from",
        metavar="FILE|auto",
        help="go on with the run of a checkpoint; auto: of the newest sound one in the work dir, if there is one",
    )
    parser.add_argument(
        "--load-from",
        metavar="FILE",
        help="start from the weights of any SlowFast checkpoint; with other classes the classifier is made anew",
    )
    parser.add_argument("--validate", action="store_true", help="validate during training and keep the best weights")
    parser.add_argument("--test-last", action="store_true", help="test the last weights, as slowfast-ext test does")
    parser.add_argument("--test-best", action="store_true", help="test the best weights (with --validate)")
    parser.add_argument("--seed", type=int, help="of all random numbers (default: a random one)")
    parser.add_argument("--diff-seed", action="store_true", help="add the process's rank to the seed")
    parser.add_argument("--deterministic", action="store_true", help="the same numbers from the same seed")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override the configuration, nested keys with dots: optimizer.lr=0.01 data.videos_per_gpu=4",
    )
    add_process_options(parser)
    parser.add_argument("--amp", choices=sorted(AMP_DTYPES), help="16-bit arithmetic where it is safe")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches an update (default: 1)")
    parser.add_argument(
        "--scale-lr",
        action="store_true",
        help="multiply the learning rate by the videos of an update over auto_scale_lr.base_batch_size",
    )
    parser.add_argument("--sync-bn", action="store_true", help="batch statistics over all processes")
    parser.add_argument(
        "--accelerate", action="store_true", help="train fused blocks, which keep half as much for the backward pass"
    )
    parser.add_argument(
        "--compile",
        choices=COMPILE_MODES,
        help="compile the network with torch.compile in the first step, which takes minutes; reduce-overhead: on a GPU "
        "as CUDA graphs, so that the host need not keep up",
    )
    parser.add_argument("--plot", action="store_true", help="draw curves.png into the work dir at the end")
    refuse(parser, "--gpus", "--gpu-ids")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config, name = resolve(args.config, args.cfg_options)
    options = RunOptions(
        work_dir=args.work_dir,
        resume_from=args.resume_from,
        load_from=args.load_from,
        validate=args.validate,
        seed=args.seed,
        diff_seed=args.diff_seed,
        deterministic=args.deterministic,
        launcher=args.launcher,
        amp=args.amp,
        accumulate=args.accumulate,
        scale_lr=args.scale_lr,
        sync_bn=args.sync_bn,
        accelerate=args.accelerate,
        compile=args.compile,
        plot=args.plot,
    )
    tests = _Tests(args, config)
    start = starting_weights(name)
    if start and not (args.load_from or args.resume_from or config.get("load_from")):
        print(
            f"slowfast-ext train: warning: the published run began with the weights of {start}: --load-from FILE",
            file=sys.stderr,
        )
    try:
        stopped = train(config, name, options, evaluate, finish=tests)
    except TrainingError as error:
        print(f"slowfast-ext train: error: {error}", file=sys.stderr)
        return 1
    return 130 if stopped == signal.SIGINT else int(tests.failed > 0)


class _Tests:
    """What --test-last and --test-best ask for, when the training is done.

    Attributes:
        failed: videos that could not be read.
    """

    def __init__(self, args: argparse.Namespace, config: dict[str, Any]):
        self.last, self.best, self.failed = args.test_last, args.test_best, 0
        if not (self.last or self.best):
            return
        self.settings = read_settings(config)
        self.metrics = self.settings.evaluation.metrics
        Test(metrics=self.metrics, command="train").check(self.settings)
        if self.best and not (args.validate and self.settings.evaluation.save_best):
            raise ValueError("--test-best must be given with --validate and evaluation.save_best, got it without")

    def __call__(self, processes: Processes, work_dir: Path) -> None:
        for wanted, what in ((self.last, "last"), (self.best, "best")):
            if not wanted:
                continue
            checkpoint = processes.from_main(_checkpoint(work_dir, what) if processes.is_main else None)
            if checkpoint is None:
                raise TrainingError(f"--test-best must have a validation in the run, got none in '{work_dir}'")
            if processes.is_main:
                print(f"test of {checkpoint}")
            test = Test(str(work_dir / f"{what}_pred.pkl"), self.metrics, command="train")
            test.check(self.settings)
            self.failed += run_test(test, self.settings, checkpoint, processes)


def _checkpoint(work_dir: Path, what: str) -> str | None:
    """The path of the last or the best weights of a run."""
    last, content, _ = CheckpointFolder(work_dir).newest_sound()
    if what == "last":
        return str(last)
    best = content["meta"]["hook_msgs"]["best_ckpt"]
    return best and str(work_dir / best)
