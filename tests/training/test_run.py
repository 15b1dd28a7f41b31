"""Whole runs of a small network on made clips."""

import functools
import json
import math
import os
import signal

import pytest
import torch
from synthetic import CLASSES, SOURCE, InProcessLoader, SyntheticDataset, small_configuration

import slowfast_ext
from slowfast_ext.data import Failure
from slowfast_ext.evaluation import evaluate
from slowfast_ext.models import build_model
from slowfast_ext.training import DataSource, RunOptions, TrainingError, apply_overrides, read_config, train
from slowfast_ext.training.checkpoint_files import read_sound
from slowfast_ext.training.curves import read_curves
from slowfast_ext.training.logs import read_log
from slowfast_ext.training.settings import read_settings


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path):
    """Train with overrides of the configuration and options; the lines of the log."""

    def run(*overrides, source=SOURCE, folder="run", keys=None, **options):
        config = apply_overrides(small_configuration(**(keys or {})), overrides)
        train(config, "small", RunOptions(str(tmp_path / folder), seed=3, **options), evaluate, source)
        paths = sorted((tmp_path / folder).glob("*.log.json"))
        return [entry for path in paths for entry in read_log(path)]

    return run


def test_the_json_lines_have_the_fields_of_the_page(run, tmp_path):
    meta, *lines = run("log_config.interval=4", validate=True)
    assert meta["seed"] == 3
    assert meta["config_name"] == "small.py"
    train_lines = [line for line in lines if line["mode"] == "train"]
    expected = [
        "mode",
        "epoch",
        "iter",
        "lr",
        "data_time",
        "top1_acc",
        "top5_acc",
        "loss_cls",
        "loss",
        "grad_norm",
        "time",
    ]
    assert all(list(line) == expected for line in train_lines)
    assert [(line["epoch"], line["iter"]) for line in train_lines] == [(e, i) for e in (1, 2, 3) for i in (4, 6)]
    validations = [line for line in lines if line["mode"] == "val"]
    assert [list(line) for line in validations] == [
        ["mode", "epoch", "iter", "lr", "top1_acc", "top5_acc", "mean_class_accuracy"]
    ] * 3
    assert [(line["epoch"], line["iter"]) for line in validations] == [(1, 6), (2, 6), (3, 6)]
    for line in train_lines:
        assert all(round(value, 5) == value for value in line.values() if isinstance(value, float))
    rates = [line["lr"] for line in train_lines if line["iter"] == 4]
    assert rates == pytest.approx(
        [0.05 * (1 - 0.5 * 0.9), 0.025 * (1 + math.cos(math.pi / 3)), 0.025 * (1 + math.cos(2 * math.pi / 3))], abs=1e-5
    )
    text = next((tmp_path / "run").glob("*.log")).read_text()
    assert "Epoch [1][4/6]\tlr: 2.750e-02, eta: 0:00:0" in text
    assert "Epoch(val) [3][6]\ttop1_acc: " in text


def test_the_network_learns_and_the_checkpoint_is_its_own_description(run, tmp_path):
    lines = run("total_epochs=8", "optimizer.lr=0.02", "model.cls_head.dropout_ratio=0", validate=True)
    best = max(line["top1_acc"] for line in lines if line.get("mode") == "val")
    assert best == 1.0
    path = next((tmp_path / "run").glob("best_top1_acc_epoch_*.pth"))
    model = slowfast_ext.load_checkpoint(path).eval()
    assert model.load_report.source_format == "slowfast_ext"
    dataset = SyntheticDataset(read_settings(small_configuration()).val, CLASSES, 0)
    clips, labels = zip(*(dataset.sample(index) for index in range(12)), strict=True)
    normalization = model.config.normalization
    clip = (torch.stack(clips) - torch.tensor(normalization.mean)) / torch.tensor(normalization.std)
    with torch.no_grad():
        assert model(clip.permute(0, 4, 1, 2, 3)).argmax(1).tolist() == list(labels)


def test_the_checkpoint_has_the_entries_of_mmaction2(run, tmp_path):
    run("total_epochs=2", validate=True)
    content = torch.load(tmp_path / "run" / "epoch_2.pth", weights_only=True)
    assert {"meta", "state_dict", "optimizer"} <= content.keys()
    meta = content["meta"]
    assert (meta["epoch"], meta["iter"], meta["seed"], meta["config_name"]) == (2, 12, 3, "small.py")
    assert meta["hook_msgs"]["best_ckpt"].startswith("best_top1_acc_epoch_")
    assert content["optimizer"].keys() == {"state", "param_groups"}
    (tmp_path / "again.py").write_text(meta["config"])
    assert read_config(tmp_path / "again.py") == read_config(tmp_path / "run" / "small.py")


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(run, tmp_path):
    class Poisoned(InProcessLoader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if self.dataset.epoch == 1 and number == 2:
                    poisoned.append(True)
                yield batch

    poisoned = []
    real = torch.nn.functional.cross_entropy

    def cross_entropy(*args, **kwargs):
        return real(*args, **kwargs) * (float("nan") if poisoned else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slowfast_ext.training.step.F.cross_entropy", cross_entropy)
        with pytest.raises(TrainingError, match="the loss must be finite, got nan in epoch 2, iteration 3 "):
            run(source=DataSource(SyntheticDataset, Poisoned))
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.glob("*.pth")) == ["epoch_1.pth", "latest.pth"]
    weights = read_sound(folder / "epoch_1.pth")["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


def test_gradients_that_are_not_finite_stop_the_run_too(run, tmp_path):
    real = torch.nn.utils.get_total_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.utils.get_total_norm", lambda grads: real(grads) * float("inf"))
        with pytest.raises(
            TrainingError, match="norm of the gradients must be finite, got inf in epoch 1, iteration 1 "
        ):
            run()
    assert not list((tmp_path / "run").glob("*.pth"))


def test_data_that_are_lost_stop_the_run(run):
    class Lost(InProcessLoader):
        def __iter__(self):
            yield next(super().__iter__())
            raise RuntimeError("11 videos in a row cannot be read")

    with pytest.raises(TrainingError, match="the loader must give a batch, got an error: 11 videos in a row"):
        run(source=DataSource(SyntheticDataset, Lost))


def test_videos_that_cannot_be_read_are_told_with_their_path(run, tmp_path):
    class Failing(InProcessLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch | {"errors": [Failure(3, "broken.mp4", "no frames", None if self.dataset.test else 4)]}

    run("total_epochs=1", source=DataSource(SyntheticDataset, Failing), validate=True)
    text = next((tmp_path / "run").glob("*.log")).read_text()
    assert "WARNING - cannot read 'broken.mp4': no frames; another video takes its place" in text
    assert "WARNING - validation: 6 videos cannot be read and are left out: 'broken.mp4'" in text


def test_precise_statistics_replace_the_moving_averages_before_checkpoint_and_validation(run, tmp_path):
    run("precise_bn.num_iters=4", "precise_bn.interval=2", "total_epochs=2")
    run("total_epochs=2", folder="plain")
    name = "backbone.slow_path.layer1.0.conv1.bn.running_mean"
    for epoch, same in ((1, True), (2, False)):
        one, other = (read_sound(tmp_path / folder / f"epoch_{epoch}.pth") for folder in ("run", "plain"))
        assert one["state_dict"][name].equal(other["state_dict"][name]) == same
        weight = "backbone.slow_path.layer1.0.conv1.conv.weight"
        assert one["state_dict"][weight].equal(other["state_dict"][weight])


def test_a_stop_during_precise_statistics_is_one_before_them(run, tmp_path):
    """They are begun again, from the same weights, and nothing of the first attempt is left."""
    overrides = ("precise_bn.num_iters=4", "total_epochs=1")
    expected = _state_of(run, tmp_path, "calm", *overrides)

    class Stopping(InProcessLoader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if self.sampler.seed > 2**32 and number == 2:  # the order of their own that precise statistics have
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    run(*overrides, source=DataSource(SyntheticDataset, Stopping))
    assert [path.name for path in (tmp_path / "run").glob("epoch*")] == ["epoch_0_iter_6.pth"]
    found = _state_of(run, tmp_path, "run", *overrides)
    assert all(value.equal(found[name]) for name, value in expected.items())


def _state_of(run, tmp_path, folder, *overrides):
    run(*overrides, folder=folder, resume_from="auto")
    return read_sound(tmp_path / folder / "epoch_1.pth")["state_dict"]


def test_a_checkpoint_of_other_hyperparameters_brings_only_its_momenta(run, tmp_path):
    run("total_epochs=1")
    run("total_epochs=2", "optimizer.weight_decay=0.5", "optimizer.momentum=0.25", resume_from="auto")
    group = read_sound(tmp_path / "run" / "epoch_2.pth")["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0.25)


def test_a_validation_without_readable_videos_stops_the_run(run):
    class Unreadable(InProcessLoader):
        def __iter__(self):
            for batch in super().__iter__():
                if self.dataset.test:
                    failure = Failure(0, "broken.mp4", "no frames", None)
                    batch = {"clip": batch["clip"][:0], "label": batch["label"][:0], "index": [], "errors": [failure]}
                yield batch

    with pytest.raises(TrainingError, match=r"must have readable videos, got none: 'broken\.mp4': no frames"):
        run(source=DataSource(SyntheticDataset, Unreadable), validate=True)


def test_fewer_batches_than_precise_statistics_need_are_told_before_any_work(run, tmp_path):
    with pytest.raises(ValueError, match=r"precise_bn\.num_iters must be at most the 6 batches of an epoch, got 7"):
        run("precise_bn.num_iters=7")
    assert not list((tmp_path / "run").glob("*.pth"))


MULTIGRID = {
    "lr_config": {"policy": "step", "step": [2, 3], "warmup": None},
    "total_epochs": 4,
    "multigrid": {
        "epoch_factor": 1.5,
        "long_cycle_factors": [[0.5, 0.7071], [1, 1]],
        "short_cycle_factors": [0.5, 0.7071],
        "default_s": (32, 32),
    },
}


@pytest.mark.parametrize("short_cycle", [True, False])
def test_multigrid_changes_the_clips_with_epoch_and_batch(run, short_cycle):
    shapes = []

    class Watching(InProcessLoader):
        def __iter__(self):
            for batch in super().__iter__():
                shapes.append((self.dataset.epoch, *batch["clip"].shape[:4]))
                yield batch

    source = DataSource(lambda *arguments: SyntheticDataset(*arguments, length=48), Watching)
    lines = run(f"multigrid.short_cycle={short_cycle}", source=source, keys=MULTIGRID)
    last = max(epoch for epoch, *_ in shapes)
    assert last == 5  # 4 epochs, times 1.5
    full, half = (2, 8, 32, 32), (8, 4, 23, 23)
    if short_cycle:
        assert [shape for epoch, *shape in shapes if epoch == last][:4] == [
            [8, 8, 16, 16], [4, 8, 23, 23], [2, 8, 32, 32], [8, 8, 16, 16]
        ]  # fmt: skip
        assert [16, 4, 16, 16] in [shape for epoch, *shape in shapes if epoch == 0]
    else:
        assert {tuple(shape) for epoch, *shape in shapes if epoch == 0} == {half}
        assert {tuple(shape) for epoch, *shape in shapes if epoch == last} == {full}
    rates = {line["epoch"]: line["lr"] for line in lines if line.get("mode") == "train"}
    assert rates[1] == pytest.approx(0.05 * 4)  # the batch of the first phase is four times the full one


def test_a_training_set_smaller_than_the_largest_batch_is_told_before_any_work(run, tmp_path):
    with pytest.raises(ValueError, match="must fill a batch of 16 videos in each process, got 12 videos of 12"):
        run(keys=MULTIGRID)
    with pytest.raises(ValueError, match="must fill a batch of 16 videos in each process, got 12 videos of 12"):
        run("data.videos_per_gpu=16", "model.backbone.norm_cfg.type=SubBatchBN3d")
    assert not list((tmp_path / "run").glob("*.pth"))


def test_multigrid_with_sub_batch_norm_keeps_the_statistics_of_full_batches(run, tmp_path):
    source = DataSource(lambda *arguments: SyntheticDataset(*arguments, length=48), InProcessLoader)
    run("model.backbone.norm_cfg.type=SubBatchBN3d", source=source, keys=MULTIGRID, validate=True)
    first = read_sound(tmp_path / "run" / "epoch_1.pth")["training"]["split_statistics"]
    last = read_sound(tmp_path / "run" / "epoch_6.pth")["training"]["split_statistics"]
    name = "backbone.slow_path.conv1.bn"
    assert (first[name][0].numel(), last[name][0].numel()) == (4 * 8, 1 * 8)


def test_sub_batch_norm_goes_on_with_the_statistics_of_its_parts(run, tmp_path):
    class Stopping(InProcessLoader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    overrides = ("model.backbone.norm_cfg.type=SubBatchBN3d", "model.backbone.norm_cfg.num_splits=2", "total_epochs=1")
    run(*overrides, folder="calm")
    run(*overrides, source=DataSource(SyntheticDataset, Stopping))
    run(*overrides, resume_from="auto")
    expected, found = (read_sound(tmp_path / folder / "epoch_1.pth") for folder in ("calm", "run"))
    for part in ("state_dict", "training"):
        one, other = (content[part] for content in (expected, found))
        one, other = (content.get("split_statistics", content) for content in (one, other))
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=0, msg=name)


def test_accumulated_gradients_make_as_many_updates_fewer(run, tmp_path):
    updates = []
    real = torch.optim.SGD.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", lambda *args, **kw: (updates.append(1), real(*args, **kw))[1])
        run("total_epochs=1", accumulate=4)  # 6 batches: 4 and 2
    assert len(updates) == 2
    with pytest.raises(ValueError, match="--accumulate must be at least 1, got 0"):
        run(accumulate=0)


def test_the_rate_is_scaled_by_the_videos_of_an_update(run):
    with pytest.raises(ValueError, match=r"--scale-lr must have auto_scale_lr\.base_batch_size"):
        run(scale_lr=True)
    scaled = run("auto_scale_lr.base_batch_size=8", "total_epochs=1", scale_lr=True, accumulate=2)
    plain = run("total_epochs=1", folder="plain", accumulate=2)
    rates = [[line["lr"] for line in lines if line.get("mode") == "train"] for lines in (scaled, plain)]
    assert rates[0] == pytest.approx([rate / 2 for rate in rates[1]], abs=1e-5)  # 2 videos, twice, for 8


def test_a_classifier_for_other_classes_is_made_anew_and_told(run, tmp_path):
    run("total_epochs=1")
    checkpoint = tmp_path / "run" / "epoch_1.pth"
    run(
        "model.cls_head.num_classes=5",
        "optimizer.lr=1e-12",
        "total_epochs=1",
        folder="tuned",
        load_from=str(checkpoint),
    )
    text = next((tmp_path / "tuned").glob("*.log")).read_text()
    assert "the classifier is new: 5 classes, the checkpoint has 3" in text
    before, after = read_sound(checkpoint)["state_dict"], read_sound(tmp_path / "tuned" / "epoch_1.pth")["state_dict"]
    name = "backbone.slow_path.layer3.0.conv1.conv.weight"
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-8)
    assert after["cls_head.fc_cls.weight"].shape == (5, 72)


def test_a_pathway_starts_from_a_network_for_pictures(run, tmp_path):
    model = build_model(read_settings(small_configuration()).model.network)
    source = {}
    for name, value in model.backbone.slow_path.state_dict().items():
        if name.endswith("conv.weight") and "lateral" not in name:
            flat = name.replace(".conv.weight", ".weight").replace("downsample.weight", "downsample.0.weight")
            source[flat] = torch.randn(
                value.shape[0], 3 if name.startswith("conv1") else value.shape[1], *value.shape[3:]
            )
    source = {name: value for name, value in source.items() if ".0.conv1" not in name and "downsample" not in name}
    torch.save(source, tmp_path / "pictures.pth")
    pretrained = f"model.backbone.slow_pathway.pretrained={tmp_path / 'pictures.pth'}"
    run(pretrained, "optimizer.lr=1e-12", "total_epochs=1")
    text = next((tmp_path / "run").glob("*.log")).read_text()
    assert f"pictures.pth: {len(source)} entries inflated" in text
    weight = read_sound(tmp_path / "run" / "epoch_1.pth")["state_dict"]["backbone.slow_path.conv1.conv.weight"]
    torch.testing.assert_close(weight[:, :, 0], source["conv1.weight"], rtol=0, atol=1e-6)


def test_a_run_with_a_scaled_loss_keeps_float32_weights_and_goes_on_with_its_scale(run, tmp_path, monkeypatch):
    # Too large a scale: updates are left out until it has come down, which a resumed run must not go through again.
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**20))
    run("total_epochs=2", amp="fp16", validate=True, deterministic=True)
    path = tmp_path / "run" / "epoch_2.pth"
    expected = read_sound(path)
    assert all(value.dtype in (torch.float32, torch.int64) for value in expected["state_dict"].values())
    path.unlink()
    run("total_epochs=2", amp="fp16", resume_from="auto", deterministic=True)
    torch.use_deterministic_algorithms(False)
    found = read_sound(path)
    assert found["training"]["scaler"] == expected["training"]["scaler"]
    assert found["training"]["scaler"]["scale"] < 2**20
    assert all(value.equal(found["state_dict"][name]) for name, value in expected["state_dict"].items())


def test_the_seed_decides_the_run_and_its_absence_is_made_up_for(run, tmp_path):
    one = run("total_epochs=1", deterministic=True)
    other = run("total_epochs=1", folder="other", deterministic=True)
    torch.use_deterministic_algorithms(False)
    losses = [[line["loss"] for line in lines if line.get("mode") == "train"] for lines in (one, other)]
    assert losses[0] == losses[1]
    train(small_configuration(total_epochs=1), "small", RunOptions(str(tmp_path / "free")), evaluate, SOURCE)
    meta = json.loads(next((tmp_path / "free").glob("*.json")).read_text().splitlines()[0])
    assert 0 <= meta["seed"] < 2**31
    assert meta["seed"] != 3


def test_tensorboard_gets_the_scalars(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(keys={"log_config": {"interval": 2, "hooks": [{"type": "TensorboardLoggerHook"}]}}, validate=True)
    events = EventAccumulator(str(tmp_path / "run" / "tf_logs")).Reload()
    assert {"train/loss", "train/top1_acc", "val/top1_acc", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == list(range(2, 19, 2))


def test_curves_are_drawn_on_request(run, tmp_path):
    pytest.importorskip("matplotlib")
    run(validate=True, plot=True)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    curves = read_curves(tmp_path / "run")
    assert curves["val/top1_acc"][0] == [1.0, 2.0, 3.0]
    assert curves["train/loss"][0] == pytest.approx([n / 3 for n in range(1, 10)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validate": True, "keys": None}, "--validate must have data.val"),
        ({"seed_": -1}, r"--seed must be in \[0, 2\*\*31\), got -1"),
        ({"resume_from": "missing.pth"}, "--resume-from must be auto or an existing file, got 'missing.pth'"),
        ({"load_from": "missing.pth"}, "--load-from must be an existing file, got 'missing.pth'"),
    ],
)
def test_wrong_options_are_told_before_any_work(tmp_path, options, message):
    config = small_configuration()
    if "keys" in options:
        del config["data"]["val"]
    fields = {name.rstrip("_"): value for name, value in options.items() if name != "keys"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config, "small", RunOptions(str(tmp_path / "run"), **fields), evaluate, SOURCE)
    assert not (tmp_path / "run").exists()
