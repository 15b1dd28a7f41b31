"""A training run of its own process: ``python run_synthetic.py WORK_DIR [KEY=VALUE ...]``.

It prints a line with each batch, so that a test can end it there, and tells nothing else.
"""

import sys

import torch
from synthetic import SOURCE, InProcessLoader, SyntheticDataset, small_configuration

from slowfast_ext.evaluation import evaluate
from slowfast_ext.training import DataSource, RunOptions, apply_overrides, train


class TellingLoader(InProcessLoader):
    """Says which batch is about to be used."""

    def __iter__(self):
        for batch in super().__iter__():
            print(f"batch {batch['index'].tolist()}", file=sys.stderr, flush=True)
            yield batch


def main(work_dir, *overrides, source=SOURCE):
    torch.set_num_threads(1)
    options = RunOptions(work_dir, resume_from="auto", validate=True, seed=5, deterministic=True)
    config = apply_overrides(small_configuration(), ["checkpoint_config.iterations=2", *overrides])
    return train(config, "small", options, evaluate, source)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:], source=DataSource(SyntheticDataset, TellingLoader)) is not None and 7)
