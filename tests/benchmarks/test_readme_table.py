"""The README's figures are those of a committed result."""

from pathlib import Path

import readme_table
from recorded import newest


def test_the_readme_has_the_table_of_the_newest_result():
    readme = (Path(readme_table.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert readme_table.markdown(newest("latency")) in readme
