import json
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from sample_videos import bad_videos, real_clip, write_video

from slowfast_ext.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good and bad videos, and a list of them."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "good.mp4", 20)
    (folder / "also_good.mp4").symlink_to(real_clip("carphone_pristine"))
    content = bytearray(real_clip("bikes").read_bytes())
    content[200_000:220_000] = np.random.default_rng(0).bytes(20_000)
    (folder / "damaged.mp4").write_bytes(content)
    bad = {path.name: reason for path, reason in bad_videos(folder).items()}
    bad["damaged.mp4"] = "its frames are damaged or cut short"
    names = ["good.mp4", *bad, "also_good.mp4"]
    (folder / "list.txt").write_text("".join(f"{name} {index}\n" for index, name in enumerate(names)))
    (folder / "bad.json").write_text(json.dumps(bad))
    return folder


def test_every_bad_video_is_reported_with_its_reason_and_left_out_of_the_list(folder, tmp_path, capsys):
    bad = json.loads((folder / "bad.json").read_text())
    before = sorted(os.listdir(folder))
    out, kept = tmp_path / "out.json", tmp_path / "kept.txt"
    argv = [folder / "list.txt", "--root", folder, "--workers", 2, "--json", out, "--remove-from", kept]
    assert main(["check-videos", *map(str, argv)]) == 1

    result = json.loads(out.read_text())
    assert (result["complete"], result["videos"], result["checked"]) == (True, 11, 11)
    assert [entry["position"] for entry in result["bad"]] == list(range(2, 11))
    for entry, (name, reason) in zip(result["bad"], bad.items(), strict=True):
        assert entry["path"] == str(folder / name)
        assert entry["reason"].startswith(reason)
    assert kept.read_text() == "good.mp4 0\nalso_good.mp4 10\n"
    assert sorted(os.listdir(folder)) == before
    *lines, last = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"{entry['path']}: {entry['reason']}" for entry in result["bad"])
    assert last == "9 of 11 videos are bad"


def test_a_list_of_good_videos_is_no_fault(folder, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("good.mp4 0\n")
    argv = [tmp_path / "list.txt", "--root", folder, "--decoder", "pyav", "--workers", 1]
    assert main(["check-videos", *map(str, argv)]) == 0
    assert capsys.readouterr().out == "0 of 1 videos are bad\n"


def test_folders_of_frames_are_checked_and_a_json_list_is_shortened(tmp_path, capsys):
    for name, frames in [("whole", 4), ("short", 3)]:
        (tmp_path / name).mkdir()
        for number in range(frames):
            cv2.imwrite(str(tmp_path / name / f"{number:03}.png"), np.zeros((8, 8, 3), np.uint8))
    entries = [{"frame_dir": name, "total_frames": 4, "label": [0]} for name in ("short", "whole", "none")]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    kept = tmp_path / "kept.json"
    argv = [tmp_path / "list.json", "--root", tmp_path, "--rawframes", "--filename-template", "{:03}.png"]
    argv += ["--start-index", 0, "--workers", 1, "--remove-from", kept]
    assert main(["check-videos", *map(str, argv)]) == 1
    assert json.loads(kept.read_text()) == [entries[1]]
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/short: it has no frame '003.png'",
        f"{tmp_path}/none: there is no such folder",
        "2 of 3 videos are bad",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_video_that_hangs_is_bad(tmp_path, capsys):
    os.mkfifo(tmp_path / "img_00001.jpg")  # opening it waits for a writer
    (tmp_path / "list.txt").write_text(". 1 0\n")
    argv = [tmp_path / "list.txt", "--root", tmp_path, "--rawframes", "--timeout", 0.5, "--workers", 1]
    assert main(["check-videos", *map(str, argv)]) == 1
    assert "it took longer than 0.5 s" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_found(tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    (tmp_path / "hangs").mkdir()
    os.mkfifo(tmp_path / "hangs" / "img_00001.jpg")
    (tmp_path / "list.txt").write_text("missing 1 0\nhangs 1 0\n")
    argv = ["list.txt", "--rawframes", "--workers", "2", "--json", "out.json", "--remove-from", "kept.txt"]
    command = [sys.executable, "-m", "slowfast_ext", "check-videos", *argv]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        try:
            assert run.stdout.readline() == "./missing: there is no such folder\n"
            time.sleep(0.2)
            os.killpg(run.pid, signal.SIGINT)
            assert run.wait(30) == 130
            assert "Traceback" not in run.stderr.read()
        finally:
            run.kill()  # it goes on where the tests were started with SIGINT ignored
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["complete"], result["videos"], result["checked"]) == (False, 2, 1)
    assert [entry["position"] for entry in result["bad"]] == [1]
    assert not (tmp_path / "kept.txt").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing.txt"], "No such file or directory: 'nothing.txt'"),
        (["empty.txt"], "empty.txt: the list must name at least one video, got none"),
        (["wrong.txt"], "wrong.txt, line 2: the line must be 'path label [label ...]', got 'b.mp4'"),
        (["good.txt", "--root", "nowhere"], "--root must be an existing folder, got 'nowhere'"),
        (["good.txt", "--json", "nowhere/out.json"], "--json must be a file in an existing, writable folder"),
        (["good.txt", "--remove-from", "."], "--remove-from must be a file in an existing, writable folder"),
        (["good.txt", "--with-offset"], "--with-offset must come with --rawframes, got it alone"),
        (["good.txt", "--filename-template", "a.jpg"], "filename_template must have one field"),
        (["good.txt", "--timeout", "0"], "timeout must be positive or None, got 0.0"),
    ],
)
def test_wrong_arguments_are_rejected_before_any_work(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("a.mp4 0\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.txt").write_text("a.mp4 0\nb.mp4\n")
    assert main(["check-videos", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
