import json

import pytest

from slowfast_ext.training import apply_overrides, format_config, read_config


def _write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_configuration_is_read_and_never_run(tmp_path):
    marker = tmp_path / "ran"
    path = _write(tmp_path / "c.py", f"lr = open({str(marker)!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"line 1 must be a literal, dict\(\.\.\.\), a list.*got \"open\("):
        read_config(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "statement",
    [
        "import os",
        "lr = __import__('os').getcwd()",
        "lr = [x for x in (1, 2)]",
        "lr = (lambda: 1)()",
        "dict = 1\nlr = dict(**'a')",
        "if True:\n    lr = 1",
        "lr = 9 ** 9 ** 9",
        "lr = 'a' * 10 ** 9",
        "lr = b'x'",
        "lr = data.train",
        "a = b = 1",
        "lr = f'{x!r}'",
        "lr = {1.5: 2}",
        "lr = 1 / 0",
        "lr = (",
    ],
)
def test_everything_but_data_is_an_error(tmp_path, statement):
    with pytest.raises(ValueError, match=r"^config: '.*c\.py'"):
        read_config(_write(tmp_path / "c.py", statement))


def test_the_forms_that_mmaction2_uses_are_read(tmp_path):
    text = """
    '''A docstring.'''
    data_root = 'data/kinetics400'
    norm = dict(mean=[123.675, 116.28, 103.53], to_bgr=False)
    steps = [dict(type='Resize', scale=(-1, 256)), dict(type='Normalize', **norm)]
    data = dict(train=dict(root=data_root, list=f'{data_root}/train.txt', pipeline=steps), flips={2: 4})
    lr_config = dict(step=[14, 18], warmup_iters=16343 // 32, rate=-0.1 + 0.3 * 2)
    joined = ['a'] + ['b']
    names = joined
    first = norm['mean']
    log_level = 'INFO'
    total_epochs = 256
    """
    config = read_config(_write(tmp_path / "c.py", "\n".join(line[4:] for line in text.splitlines())))
    assert config == {
        "data": {
            "train": {
                "root": "data/kinetics400",
                "list": "data/kinetics400/train.txt",
                "pipeline": [
                    {"type": "Resize", "scale": (-1, 256)},
                    {"type": "Normalize", "mean": [123.675, 116.28, 103.53], "to_bgr": False},
                ],
            },
            "flips": {2: 4},
        },
        "lr_config": {"step": [14, 18], "warmup_iters": 510, "rate": 0.5},
        "names": ["a", "b"],
        "first": [123.675, 116.28, 103.53],
        "log_level": "INFO",
        "total_epochs": 256,
    }


def test_a_variable_is_no_key_but_an_unused_name_is(tmp_path):
    config = read_config(_write(tmp_path / "c.py", "a = 1\nb = dict(c=a)\nd = 2\n"))
    assert config == {"b": {"c": 1}, "d": 2}


def test_bases_are_merged_and_delete_replaces(tmp_path):
    (tmp_path / "_base_").mkdir()
    _write(
        tmp_path / "_base_" / "model.py",
        "prefix = 'x'\nmodel = dict(depth=50, head=dict(classes=400, drop=0.5, p=prefix))\n",
    )
    _write(tmp_path / "_base_" / "runtime.py", "log_level = 'INFO'\nload_from = None\n")
    child = """
_base_ = ['_base_/model.py', '_base_/runtime.py']
model = dict(head=dict(classes=7))
load_from = dict(a=1)
kept = {{_base_.model.depth}}
name = {{_base_.prefix}}
"""
    config = read_config(_write(tmp_path / "child.py", child))
    assert config == {
        "model": {"depth": 50, "head": {"classes": 7, "drop": 0.5, "p": "x"}},
        "log_level": "INFO",
        "load_from": {"a": 1},
        "kept": 50,
        "name": "x",
    }
    grandchild = "_base_ = './child.py'\nmodel = dict(head=dict(_delete_=True, type='other'))\n"
    config = read_config(_write(tmp_path / "grandchild.py", grandchild))
    assert config["model"] == {"depth": 50, "head": {"type": "other"}}


def test_a_variable_of_a_base_that_nothing_refers_to_is_not_silently_dropped(tmp_path):
    """mmaction2 ignores it: the base's pipeline stays as it was."""
    _write(tmp_path / "base.py", "pipeline = [1]\ndata = dict(pipeline=pipeline)\n")
    config = read_config(_write(tmp_path / "child.py", "_base_ = 'base.py'\npipeline = [2]\n"))
    assert config == {"data": {"pipeline": [1]}, "pipeline": [2]}  # which read_settings then rejects


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_base_ = 'missing.py'\n", "must be an existing file"),
        ("_base_ = 'c.py'\n", "must not lead back to the file itself"),
        ("_base_ = 5\n", "must be a path or a list of paths"),
        ("_base_ = ['one.py', 'two.py']\n", r"must set different keys, got \['a'\] twice"),
        ("_base_ = 'one.py'\na = dict(b=1)\n", "must have _delete_=True to replace 1"),
        ("_base_ = 'one.py'\nb = {{_base_.c}}\n", "a name that a base file sets"),
        ("b = dict(c=optimzer)\n", "line 1 must be a name assigned before"),
        ("optimizer = 1\nb = dict(c=optimzer)\n", "line 2 must be a name assigned before; did you mean optimizer?"),
    ],
)
def test_mistakes_in_bases_and_names_are_told(tmp_path, text, message):
    _write(tmp_path / "one.py", "a = 1\n")
    _write(tmp_path / "two.py", "a = 2\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_config(_write(tmp_path / "c.py", text))


def test_json_is_read_with_bases(tmp_path):
    _write(tmp_path / "base.json", json.dumps({"model": {"depth": 50, "classes": 400}}))
    _write(tmp_path / "c.json", json.dumps({"_base_": "base.json", "model": {"classes": 7}}))
    assert read_config(tmp_path / "c.json") == {"model": {"depth": 50, "classes": 7}}
    for text, message in (("[1]", "one JSON object, got list"), ("{", "must be JSON, got an error")):
        with pytest.raises(ValueError, match=message):
            read_config(_write(tmp_path / "bad.json", text))
    with pytest.raises(ValueError, match=r"must end in \.py or \.json"):
        read_config(_write(tmp_path / "c.yaml", "a: 1"))


def test_overrides_reach_nested_keys_and_list_positions():
    config = {"optimizer": {"lr": 0.1}, "data": {"pipeline": [{"scale": 1}, {"scale": 2}]}, "precise_bn": None}
    changed = apply_overrides(
        config,
        [
            "optimizer.lr=0.01",
            "optimizer.nesterov=True",
            "data.pipeline.1.scale=(-1, 320)",
            "precise_bn.num_iters=3",
            "evaluation.metrics=top_k_accuracy,mean_class_accuracy",
            "lr_config.step=[1,2]",
            "words=[a, b]",
            "load_from=None",
            "work_dir=a=b",
        ],
    )
    assert changed == {
        "optimizer": {"lr": 0.01, "nesterov": True},
        "data": {"pipeline": [{"scale": 1}, {"scale": (-1, 320)}]},
        "precise_bn": {"num_iters": 3},
        "evaluation": {"metrics": ["top_k_accuracy", "mean_class_accuracy"]},
        "lr_config": {"step": [1, 2]},
        "words": ["a", "b"],
        "load_from": None,
        "work_dir": "a=b",
    }
    assert config["optimizer"] == {"lr": 0.1}


def test_an_override_reaches_one_place_only():
    shared = {"scale": 1}
    changed = apply_overrides({"train": [shared], "val": [shared]}, ["train.0.scale=2"])
    assert changed == {"train": [{"scale": 2}], "val": [{"scale": 1}]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr", "must be KEY=VALUE, got 'lr'"),
        ("=1", "must be KEY=VALUE"),
        ("lr.a=1", "must lead through dictionaries and lists"),
        ("steps.7=1", "must have a position from 0 to 1, got '7'"),
        ("steps.x=1", "must have a position"),
    ],
)
def test_overrides_that_lead_nowhere_are_errors(override, message):
    with pytest.raises(ValueError, match=message):
        apply_overrides({"lr": 1, "steps": [1, 2]}, [override])


def test_a_written_configuration_is_read_back_as_it_was(tmp_path):
    config = {
        "a": {"b": [1, 2.5, None, True, "it's"], "c": (1,), "d": {}, "flips": {2: 4, 4: 2}},
        "pipeline": [{"type": "Resize", "scale": (-1, 256)}, {"type": "Normalize", "mean": [1.0] * 20}],
        "nested": {"one": {"two": {"three": "x" * 120}}},
        "no_names": {"not-a-name": 1, "lambda": {"a": 2}},
    }
    assert read_config(_write(tmp_path / "c.py", format_config(config))) == config
