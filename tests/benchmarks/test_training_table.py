"""docs/training.md has the figures of committed results."""

from pathlib import Path

import torch
import training_table
from kept import count_kept
from recorded import newest

import slowfast_ext

PAGE = Path(training_table.__file__).parents[1] / "docs" / "training.md"


def test_the_page_has_the_tables_of_the_newest_results():
    text = PAGE.read_text(encoding="utf-8")
    assert training_table.steps(training_table.on_a_cpu("training")) in text
    assert training_table.curves(training_table.on_a_cpu("training_curves")) in text


def test_fused_blocks_are_no_slower_and_keep_half_on_a_cpu():
    for dtype in training_table.DTYPES:
        rows = {row["name"]: row for row in newest("training", dtype)["variants"]}
        assert rows["accelerate"]["speedup_over_best_plain"] >= 1
        assert rows["accelerate"]["kept_bytes"] < 0.6 * rows["eager_channels_last"]["kept_bytes"]


def test_the_page_says_what_is_counted():
    text = PAGE.read_text(encoding="utf-8")
    counted = []
    for name in ("r50_4x16x1", "r50_8x8x1", "r101_8x8x1"):
        with torch.device("meta"):
            model = slowfast_ext.create_model(f"slowfast_{name}_256e_kinetics400_rgb").train()
        clip = (8, 3, model.config.clip_len, 224, 224)
        counted += [count_kept(model, clip, torch.bfloat16, fused, "cuda") / 2**20 for fused in (False, True)]
    figures = (
        "keeps {:.0f} MiB in plain blocks, and {:.0f} MiB in fused ones on a GPU, R50 8x8 {:.0f} and {:.0f}, R101 8x8"
    )
    assert figures.format(*counted[:4]) + " {:.0f} and {:.0f}".format(*counted[4:]) in " ".join(text.split())
