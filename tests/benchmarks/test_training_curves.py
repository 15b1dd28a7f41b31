"""The comparison of loss curves end to end, tiny, and that it can tell a wrong step from noise."""

import json

import pytest
import training_curves

import slowfast_ext


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("WINDOW", 3), ("BATCH", 4), ("SIZE", 32), ("FRAMES", 8)):
        monkeypatch.setattr(training_curves, name, value)


def _measure(tmp_path):
    path = tmp_path / "curves.json"
    status = training_curves.main(["--device", "cpu", "--steps", "7", "--json", str(path)])
    return status, json.loads(path.read_text())


def test_fused_blocks_follow_the_plain_curve(tmp_path, capsys):
    status, document = _measure(tmp_path)
    assert status == 0
    assert {len(losses) for losses in document["losses"].values()} == {7}
    assert document["first_difference"] < 1e-5
    assert document["difference_of_fused"] < 0.2 * document["difference_of_seeds"]
    assert "plain, other seed" in capsys.readouterr().out


def test_another_curve_is_noticed(tmp_path, monkeypatch):
    def wrong(model, mode):
        model.cls_head.fc_cls.weight.data.mul_(-300)
        return model

    monkeypatch.setattr(slowfast_ext, "accelerate", wrong)
    status, document = _measure(tmp_path)
    assert status == 1
    assert document["first_difference"] > 0.1


def test_fewer_steps_than_a_window_are_refused(capsys):
    with pytest.raises(SystemExit) as exit_status:
        training_curves.main(["--device", "cpu", "--steps", "2"])
    assert exit_status.value.code == 2
    assert "--steps must be at least 3, got 2" in capsys.readouterr().err


def test_the_last_window_takes_what_is_left_over():
    assert training_curves.windows([1, 2, 3, 4, 5, 6, 7]) == [2, 5.5]
