import json

import numpy as np
import pytest

from slowfast_ext.cli import main
from slowfast_ext.evaluation.result_files import write_results

# Rows: videos of classes 0, 0, 1, 2, 2.
LABELS = (0, 0, 1, 2, 2)
ONE = np.float32([[3, 1, 0], [1, 2, 0], [0, 2, 1], [0, 3, 1], [0, 2, 1]])
OTHER = np.float32([[1, 0, 0], [9, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0.5]])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("".join(f"{index}.mp4 {label}\n" for index, label in enumerate(LABELS)))
    (tmp_path / "names.txt").write_text("run\njump\nswim\n")
    write_results(tmp_path / "one.json", list(ONE))
    write_results(tmp_path / "other.pkl", list(OTHER))
    return tmp_path


def test_metrics_and_confusions_of_one_result(folder, capsys):
    assert main(["report", "one.json", "--list", "list.txt", "--labels", "names.txt", "--most", "2"]) == 0
    assert capsys.readouterr().out == (
        "top1_acc: 0.4000\ntop5_acc: 1.0000\nmean_class_accuracy: 0.5000\n"
        "\nmost confused (videos: right class -> predicted class)\n     2  swim -> jump\n     1  run -> jump\n"
        "\nleast recognised (recall, videos of the class)\n0.0000      2  swim\n0.5000      2  run\n"
    )


def test_results_are_fused_with_weights(folder, capsys):
    arguments = [
        "report",
        "one.json",
        "other.pkl",
        "--list",
        "list.txt",
        "--eval",
        "top_k_accuracy",
        "--json",
        "o.json",
    ]
    assert main([*arguments, "--weights", "1", "2.5"]) == 0
    content = json.loads((folder / "o.json").read_text())
    fused = (ONE + 2.5 * OTHER).argmax(1)
    assert fused.tolist() == [0, 0, 1, 2, 2]
    assert content["metrics"] == {"top1_acc": 1.0, "top5_acc": 1.0}
    assert content["confused"] == []
    assert main([*arguments, "--weights", "1", "1"]) == 0
    assert json.loads((folder / "o.json").read_text())["confused"] == [{"right": 2, "predicted": 1, "videos": 2}]
    # Of probabilities the sharper result counts for more.
    assert main([*arguments, "--softmax"]) == 0
    soft = np.exp(ONE) / np.exp(ONE).sum(1, keepdims=True) + np.exp(OTHER) / np.exp(OTHER).sum(1, keepdims=True)
    expected = float((soft.argmax(1) == LABELS).mean())
    assert json.loads((folder / "o.json").read_text())["metrics"]["top1_acc"] == expected


def test_videos_without_scores_are_left_out_and_said(folder, capsys):
    failed = {"path": "3.mp4", "error": "it is empty"}
    pytest.importorskip("yaml")
    write_results("failed.yaml", [*ONE[:3], failed, ONE[4]])
    assert main(["report", "failed.yaml", "other.pkl", "--list", "list.txt", "--json", "o.json"]) == 0
    assert "1 of 5 videos have no scores and do not count" in capsys.readouterr().out
    assert json.loads((folder / "o.json").read_text())["left_out"] == ["3.mp4"]


def test_the_confusion_matrix_is_drawn(folder):
    pytest.importorskip("matplotlib")
    assert main(["report", "one.json", "--list", "list.txt", "--labels", "names.txt", "--plot", "matrix.png"]) == 0
    assert (folder / "matrix.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("one.json", "--weights", "1", "2"), "--weights must be a number for each of 1 results"),
        (("short.json",), "'short.json' must have an entry for each of the 5 videos of the list, got 4"),
        (("one.json", "wide.json"), "the results must be of as many classes, got [3, 4]"),
        (("one.json", "--labels", "list.txt"), "--labels must have a name for each of 3 classes, got 5"),
        (("one.json", "--plot", "matrix.txt"), "--plot must end in .png, .pdf or .svg"),
        (("none.json",), "none.json"),
    ],
)
def test_wrong_arguments_are_one_line(folder, capsys, arguments, message):
    write_results("short.json", list(ONE[:4]))
    write_results("wide.json", list(np.zeros((5, 4), np.float32)))
    assert main(["report", *arguments, "--list", "list.txt"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
