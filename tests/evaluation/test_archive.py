import importlib.util

import pytest
import torch
from sample_videos import write_video
from small_networks import lively_checkpoint, small_config

from slowfast_ext.cli import main
from slowfast_ext.data import ViewPlan, read_views
from slowfast_ext.evaluation.inference import PlainEngine, video_probabilities, view_features

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ray", "pyarrow")),
    reason="slowfast-ext[ray] is not installed",
)
PLAN = ViewPlan(num_clips=2, num_crops=1, short_side=32, crop_size=32)
FAST = ["--num-clips", "2", "--num-crops", "1", "--crop-size", "32", "--no-accelerate"]
LABELS = ["a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    return lively_checkpoint(tmp_path_factory.mktemp("small"), small_config(18, 18))


def rows(folder):
    from pyarrow import parquet

    found = [row for path in folder.glob("*.parquet") for row in parquet.read_table(path).to_pylist()]
    return {row["path"]: row for row in found}, len(found)


@installed
def test_an_archive_is_labelled_on_a_cluster_and_goes_on_where_it_was_stopped(cluster, network, tmp_path, capsys):
    model, checkpoint = network
    engine = PlainEngine(model, dtype=torch.float32, max_views=2)
    videos = [str(write_video(tmp_path / f"{frames}.mp4", frames)) for frames in (70, 3, 12)]
    missing = str(tmp_path / "missing.mp4")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    (tmp_path / "list.txt").write_text(f"70.mp4 4\nmissing.mp4 0\n{videos[1]}\n")
    out = tmp_path / "out"
    argv = [
        "predict-archive",
        str(tmp_path / "list.txt"),
        str(out),
        "--root",
        str(tmp_path),
        "--checkpoint",
        checkpoint,
    ]
    argv += ["--labels", str(tmp_path / "labels.txt"), "--top-k", "2", "--videos-per-file", "2", *FAST]
    assert main(argv) == 1
    assert f"cannot read video '{missing}': there is no such file" in capsys.readouterr().err
    found, count = rows(out)
    assert found.keys() == {*videos[:2], missing}
    assert len(list(out.glob("*.parquet"))) == 2
    assert found[missing]["error"] == f"cannot read video '{missing}': there is no such file"
    assert found[missing]["probabilities"] is None
    for path in videos[:2]:
        expected = video_probabilities(engine, read_views(path, PLAN)).topk(2)
        assert found[path]["error"] is None
        assert found[path]["views"] == 2
        assert found[path]["classes"] == expected.indices.tolist()
        assert found[path]["labels"] == [LABELS[index] for index in expected.indices]
        assert found[path]["probabilities"] == pytest.approx(expected.values.tolist(), rel=1e-4)

    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    with open(tmp_path / "list.txt", "a") as file:
        file.write("12.mp4 1\n")
    assert main(argv) == 0
    assert "(1 videos, 0 failed; 3 were there)" in capsys.readouterr().out
    found, count = rows(out)
    assert (found.keys(), count) == ({*videos, missing}, 4)
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}.items()

    assert main(argv) == 0  # nothing is left
    assert "(0 videos, 0 failed; 4 were there)" in capsys.readouterr().out
    assert main([*argv, "--top-k", "3"]) == 2
    assert "top_k was 2, got 3" in capsys.readouterr().err


@installed
def test_an_archive_of_features_holds_their_mean_over_the_views(cluster, network, tmp_path):
    model, checkpoint = network
    video = str(write_video(tmp_path / "video.mp4", 70))
    (tmp_path / "list.txt").write_text(video)
    out = tmp_path / "out"
    argv = ["predict-archive", str(tmp_path / "list.txt"), str(out), "--checkpoint", checkpoint, *FAST]
    assert main([*argv, "--output", "features"]) == 0
    expected = view_features(PlainEngine(model, dtype=torch.float32, max_views=2), read_views(video, PLAN)).mean(0)
    found, _ = rows(out)
    assert found[video]["features"] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


@installed
def test_a_folder_of_something_else_is_refused(network, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("video.mp4")
    argv = ["predict-archive", str(tmp_path / "list.txt"), str(tmp_path), "--checkpoint", network[1], *FAST]
    assert main(argv) == 2
    assert "must be empty or an archive that was begun, got other files" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["predict-archive", "list.txt", str(tmp_path), "--checkpoint", "x.pth"]) == 2
    assert "predict-archive needs ray and pyarrow: pip install 'slowfast-ext[ray]'" in capsys.readouterr().err
