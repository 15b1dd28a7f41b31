"""docs/training.md has the figures of committed results."""

from pathlib import Path

import training_table
from readme_table import newest

PAGE = Path(training_table.__file__).parents[1] / "docs" / "training.md"


def test_the_page_has_the_tables_of_the_newest_results():
    text = PAGE.read_text(encoding="utf-8")
    assert training_table.steps() in text
    assert training_table.curves() in text


def test_fused_blocks_are_no_slower_and_keep_half_on_a_cpu():
    for dtype in training_table.DTYPES:
        rows = {row["name"]: row for row in newest("training", dtype)["variants"]}
        assert rows["accelerate"]["speedup_over_best_plain"] >= 1
        assert rows["accelerate"]["kept_bytes"] < 0.6 * rows["eager_channels_last"]["kept_bytes"]
