import os
import runpy
import subprocess
import sys

import pytest

import slowfast_ext
from slowfast_ext.cli import main
from slowfast_ext.models import ZOO


def test_zoo_prints_a_line_for_every_row(capsys):
    assert main(["zoo"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split()[0] == "config"
    assert [line.split()[0] for line in lines] == [row.name for row in ZOO]
    assert {line.split()[0] for line in lines} == set(slowfast_ext.list_models())
    assert lines[4].split() == [
        *("slowfast_r50_8x8x1_256e_kinetics400_rgb", "50/50", "8/32", "4", "no"),
        *("Kinetics-400", "short-side", "320", "76.94", "92.80"),
    ]


def test_the_module_runs_as_the_command_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["slowfast_ext", "zoo"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("slowfast_ext", run_name="__main__")
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(ZOO)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently there")
def test_a_reader_that_leaves_early_causes_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [sys.executable, "-m", "slowfast_ext", "zoo"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert run.returncode == 1
    assert run.stderr == b""


def test_convert_is_wired(tmp_path):
    assert main(["convert", str(tmp_path / "missing.pth"), str(tmp_path / "out.pth")]) != 0


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "CONFIG", "--deterministics"), "--deterministics; did you mean --deterministic?"),
        (("test", "CONFIG", "FILE", "--averge-clips=prob"), "--averge-clips=prob; did you mean --average-clips?"),
        (("predict", "v.mp4", "--checkpoint", "FILE", "--xyz"), "--xyz\n"),
    ],
)
def test_an_unknown_option_is_an_error_with_the_nearest_name(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"slowfast-ext {arguments[0]}: error: unrecognized arguments: {message}" in error


def test_the_local_rank_of_an_old_launcher_is_taken_from_either_side_of_the_command(monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "")  # what the command puts there goes in the end
    for arguments in (("--local-rank=1", "train", "CONFIG"), ("train", "CONFIG", "--local_rank", "1")):
        monkeypatch.delenv("LOCAL_RANK")
        assert main([*arguments, "--launcher", "pytorch"]) == 2
        assert "config must be" in capsys.readouterr().err
        assert os.environ["LOCAL_RANK"] == "1"
        assert main(arguments) == 2
        assert "--local_rank must come with --launcher pytorch, got none" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert main(["train", "CONFIG", "--local_rank", "1"]) == 2
    assert "--local_rank must be LOCAL_RANK of the environment, 0, got 1" in capsys.readouterr().err
    assert main(["--local_rank=0", "zoo"]) == 2
    assert "--local_rank must come with --launcher pytorch, got none" in capsys.readouterr().err


def test_importing_loads_no_decoder_and_touches_no_gpu():
    code = (
        "import sys, torch, slowfast_ext\n"
        "assert not {'decord', 'av', 'cv2'} & sys.modules.keys()\n"
        "import slowfast_ext.cli\n"
        "assert not {'decord', 'av'} & sys.modules.keys()\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
