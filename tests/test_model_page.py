"""docs/models.md says what the zoo and the recipes say. ``python tests/test_model_page.py`` writes its tables anew."""

from pathlib import Path

from slowfast_ext.models import ZOO, ZooRow
from slowfast_ext.training import RECIPES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- tables: python tests/test_model_page.py -->\n", "<!-- end of the tables -->"


def _markdown(titles: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _published(number: int, row: ZooRow) -> tuple:
    network = row.network
    frames = network.clip_len // network.resample_rate
    return (
        number,
        f"`{row.name}`",
        f"{network.slow.depth}/{network.fast.depth}",
        f"{frames}/{network.clip_len}",
        "yes" if network.lateral_norm else "no",
        f"{row.dataset}, {row.source}",
        row.gpus,
        f"{row.top1:.2f}",
        f"{row.top5:.2f}",
        row.memory_mib,
        row.videos_per_second or "",
        "",
    )


def _recipe(number: int, row: ZooRow) -> tuple:
    recipe, network = RECIPES[row.name], row.network
    steps = "cosine" if recipe.steps is None else f"steps {', '.join(map(str, recipe.steps))}"
    extras = [f"precise BN every {recipe.precise_bn_interval}"] if recipe.precise_bn_interval else []
    extras += ["multigrid"] if recipe.multigrid else []
    extras += ["`--load-from` row 5's weights"] if row.pretrained else []
    return (
        number,
        "videos" if recipe.videos else "frames",
        f"8 x {recipe.videos_per_gpu}",
        recipe.learning_rate,
        f"{recipe.epochs}{' x 1.5' if recipe.multigrid else ''}",
        steps,
        "; ".join(extras),
        f"{network.test_clips} x {network.test_crops} of {network.clip_len} x {network.test_crop_size}²",
        recipe.max_testing_views or "",
    )


def tables() -> str:
    published = _markdown(
        ("row", "CONFIG", "depth", "frames", "lateral norm", "data", "GPUs", "top-1", "top-5", "MiB", "videos/s",
         "measured here"),
        [_published(number, row) for number, row in enumerate(ZOO, start=1)],
    )  # fmt: skip
    recipes = _markdown(
        ("row", "reads", "batch", "rate", "epochs", "schedule", "besides", "views of a test", "at a time"),
        [_recipe(number, row) for number, row in enumerate(ZOO, start=1)],
    )
    return f"{published}\n{recipes}"


def test_the_model_page_agrees_with_the_zoo():
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == tables()


def test_the_fifth_row_is_what_the_last_one_begins_with():
    assert ZOO[4].name == ZOO[11].pretrained


if __name__ == "__main__":
    before, after = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{tables()}{END}{after.split(END)[1]}", encoding="utf-8")
