import argparse
import json

import pytest
import safetensors
import torch
from small_networks import lively_model, small_config

from slowfast_ext.checkpoints import convert, load_checkpoint
from slowfast_ext.checkpoints.settings import CONFIG_ENTRY
from slowfast_ext.cli import convert as command
from slowfast_ext.cli import main


@pytest.fixture
def source(tmp_path):
    torch.save({"state_dict": lively_model(small_config(18, 18)).state_dict()}, tmp_path / "source.pth")
    return tmp_path / "source.pth"


def test_pth_is_readable_by_mmaction2(source, tmp_path):
    convert(source, tmp_path / "out.pth")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert set(content) == {"meta", "state_dict"}
    original = torch.load(source, weights_only=True)["state_dict"]
    assert list(content["state_dict"]) == list(original)
    assert all(value.equal(original[name]) for name, value in content["state_dict"].items())


def test_safetensors_states_the_configuration_in_its_header(source, tmp_path):
    convert(source, tmp_path / "out.safetensors")
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert json.loads(file.metadata()[CONFIG_ENTRY])["slow"]["depth"] == 18


def test_conversion_replaces_the_destination_and_leaves_nothing_else(source, tmp_path):
    (tmp_path / "out.pth").write_text("old")
    convert(source, tmp_path / "out.pth")
    convert(tmp_path / "out.pth", tmp_path / "out.pth")
    assert load_checkpoint(tmp_path / "out.pth").load_report.source_format == "slowfast_ext"
    assert {path.name for path in tmp_path.iterdir()} == {"source.pth", "out.pth"}


def test_failed_writing_leaves_the_old_file(source, tmp_path, monkeypatch):
    (tmp_path / "out.pth").write_text("old")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        convert(source, tmp_path / "out.pth")
    assert (tmp_path / "out.pth").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"source.pth", "out.pth"}


@pytest.mark.parametrize("name", ["out.onnx", "out", "out.pkl"])
def test_other_suffixes_are_refused(source, tmp_path, name):
    with pytest.raises(ValueError, match=r"destination must end in \.pth or \.safetensors, got"):
        convert(source, tmp_path / name)


def test_missing_folder_is_named_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder of destination must exist, got .*nowhere"):
        convert(tmp_path / "missing.pth", tmp_path / "nowhere" / "out.pth")


@pytest.mark.parametrize("text", ["{", "[]", '{"slow": 3}', '{"unknown": 1}'])
def test_damaged_configuration_is_named(source, tmp_path, text):
    state = torch.load(source, weights_only=True)["state_dict"]
    torch.save({"meta": {CONFIG_ENTRY: text}, "state_dict": state}, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match="the stored network configuration is damaged"):
        load_checkpoint(tmp_path / "damaged.pth")


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["convert", *map(str, arguments)])
    return args.run(args)


def test_command_prints_the_report(source, tmp_path, capsys):
    assert run(source, tmp_path / "out.safetensors") == 0
    assert "mmaction2 checkpoint, " in capsys.readouterr().out
    assert (tmp_path / "out.safetensors").exists()


def test_command_fails_with_the_reason(source, tmp_path, capsys):
    for arguments, reason in (
        ((tmp_path / "missing.pth", tmp_path / "out.pth"), "existing file"),
        ((source, tmp_path / "out.txt"), "must end in"),
    ):
        assert main(["convert", *map(str, arguments)]) == 2
        assert reason in capsys.readouterr().err
