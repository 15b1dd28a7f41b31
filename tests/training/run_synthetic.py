"""A training run of its own process: ``python run_synthetic.py WORK_DIR [--SWITCH ...] [KEY=VALUE ...]``.

It prints a line with each batch, so that a test can end it there. Its status is 7 if a signal stopped it.
"""

import os
import signal
import sys

import torch
from synthetic import SOURCE, InProcessLoader, SyntheticDataset, small_configuration

from slowfast_ext.evaluation import evaluate
from slowfast_ext.training import DataSource, RunOptions, apply_overrides, train


class TellingLoader(InProcessLoader):
    """Says which batch is about to be used; the process of rank STOP_RANK asks itself to stop at the fourth."""

    told = 0

    def __iter__(self):
        for batch in super().__iter__():
            print(f"batch {batch['index'].tolist()}", file=sys.stderr, flush=True)
            TellingLoader.told += 1
            if TellingLoader.told == 4 and os.environ.get("STOP_RANK") == os.environ.get("RANK", "0"):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def main(work_dir, *overrides, source=SOURCE, **options):
    torch.set_num_threads(1)
    options = RunOptions(work_dir, resume_from="auto", validate=True, seed=5, deterministic=True, **options)
    config = apply_overrides(small_configuration(), ["checkpoint_config.iterations=2", *overrides])
    return train(config, "small", options, evaluate, source)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    switches = {name: f"--{name.replace('_', '-')}" in sys.argv for name in ("accelerate", "diff_seed", "sync_bn")}
    source = DataSource(SyntheticDataset, TellingLoader)
    stopped = main(*arguments, source=source, **switches)
    sys.exit(0 if stopped is None else 7)
