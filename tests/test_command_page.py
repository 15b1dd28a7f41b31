"""docs/commands.md says what the parsers of the commands know: every option, every choice, every refusal."""

import argparse
from pathlib import Path

import pytest

from slowfast_ext.cli import main, test, train

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
COMMANDS = {"train": train, "test": test}
# Of tools/train.py and tools/test.py in mmaction2 0.24.
THEIRS = {
    "train": {
        *("CONFIG", "--work-dir", "--resume-from", "--validate", "--test-last", "--test-best", "--gpus", "--gpu-ids"),
        *("--seed", "--diff-seed", "--deterministic", "--cfg-options", "--launcher", "--local_rank"),
    },
    "test": {
        *("CONFIG", "CHECKPOINT", "--out", "--fuse-conv-bn", "--eval", "--gpu-collect", "--tmpdir", "--options"),
        *("--eval-options", "--cfg-options", "--average-clips", "--launcher", "--local_rank", "--onnx", "--tensorrt"),
    },
}


def _rows(command):
    """First option -> all of its names, what mmaction2 does, what the command does."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {command}\n")[1].split("\n## ")[0]
    rows = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            names, there, here = (cell.strip() for cell in line.strip("|").split("|"))
            names = tuple(name.strip("`") for name in names.split(", "))
            assert names[0] not in rows
            rows[names[0]] = names, there, here
    return rows


def _actions(command):
    parser = argparse.ArgumentParser()
    COMMANDS[command].add_parser(parser.add_subparsers())
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    actions = [action for action in subparsers.choices[command]._actions if action.dest != "help"]
    return {(action.option_strings or [action.metavar])[0]: action for action in actions}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_has_every_option_of_the_command_and_of_mmaction2(command):
    rows, actions = _rows(command), _actions(command)
    assert {name: names for name, (names, _, _) in rows.items()} == {
        name: tuple(action.option_strings or [action.metavar]) for name, action in actions.items()
    }
    assert {name for name, (_, there, _) in rows.items() if there} == THEIRS[command]
    for name, action in actions.items():
        _, there, here = rows[name]
        for choice in action.choices or ():
            assert f"`{choice}`" in there + here, name


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_page_calls_an_error_is_one_and_says_what_to_use(command, capsys):
    refused = {name: here for name, (_, _, here) in _rows(command).items() if here.startswith("error: ")}
    hidden = {name for name, action in _actions(command).items() if action.help == argparse.SUPPRESS}
    assert refused.keys() == hidden
    for name, here in refused.items():
        with pytest.raises(SystemExit) as caught:
            main([command, "CONFIG", *(["CHECKPOINT"] if command == "test" else []), name, "1"])
        assert caught.value.code == 2
        expected = f"argument {name}: must be left out: {here.removeprefix('error: ')}\n"
        assert capsys.readouterr().err.endswith(expected)
