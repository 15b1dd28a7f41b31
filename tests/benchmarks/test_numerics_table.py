"""docs/numerics.md has the figures of a committed result, and they are what the page says."""

from pathlib import Path

import numerics
import numerics_table
from recorded import newest

PAGE = Path(numerics_table.__file__).parents[1] / "docs" / "numerics.md"


def test_the_page_has_the_table_of_the_newest_result():
    assert numerics_table.markdown(newest("numerics")) in PAGE.read_text(encoding="utf-8")


def test_the_engine_is_no_further_from_the_exact_scores_and_classes_than_eager():
    rows = {(row["model"], row["dtype"], row["way"]): row for row in newest("numerics")["rows"]}
    assert {(model, dtype) for model, dtype, _ in rows} == {
        (model, dtype) for model in numerics.MODELS for dtype in ("float32", "bfloat16")
    }
    for model, dtype, _ in rows:
        engine, eager = rows[model, dtype, "engine"], rows[model, dtype, "eager"]
        assert engine["mean_error"] <= eager["mean_error"]
        for agreement in ("top1_agreement", "top5_agreement"):
            assert engine[agreement] >= eager[agreement]
