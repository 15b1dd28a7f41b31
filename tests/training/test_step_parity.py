"""The recipe against an independent computation: SGD, warm-up, clipping and batch statistics written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import small_config
from synthetic import SyntheticDataset, small_configuration

from slowfast_ext.models import build_model
from slowfast_ext.training import apply_overrides, read_settings
from slowfast_ext.training.schedules import LearningRate
from slowfast_ext.training.step import TrainingStep

ITERATIONS, BATCH = 6, 4
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


def _settings(*overrides):
    return read_settings(apply_overrides(small_configuration(total_epochs=4), overrides))


def _model(seed=0):
    torch.manual_seed(seed)
    return build_model(small_config(18, 18, num_classes=3, clip_len=8, dropout=0.0)).double()


def _batches(settings, count, size=16, frames=8):
    """Small pictures: float64 convolutions are slow."""
    dataset = SyntheticDataset(settings.train, 3, 0)
    dataset.size, dataset.frames = size, frames
    batches = []
    for index in range(count):
        clips, labels = zip(*(dataset.sample(BATCH * index + offset) for offset in range(BATCH)), strict=True)
        batches.append({"clip": torch.stack(clips), "label": torch.tensor(labels)})
    return batches


class PlainRecipe:
    """The published recipe in tensors: no optimiser, no schedule, no clipping function, no loss function of torch."""

    def __init__(
        self, model, *, lr=0.05, momentum=0.9, decay=1e-4, max_norm=40.0, warmup=ITERATIONS, epochs=4, nesterov=False
    ):
        self.model = model.train()
        self.lr, self.momentum, self.decay, self.max_norm = lr, momentum, decay, max_norm
        self.warmup, self.epochs, self.nesterov = warmup, epochs, nesterov
        self.velocity = [None] * len(list(model.parameters()))
        self.iteration = 0

    def step(self, batch):
        epoch = self.iteration // ITERATIONS
        lr = 0.5 * self.lr * (1 + math.cos(math.pi * epoch / self.epochs))
        if self.iteration < self.warmup:
            lr *= 1 - (1 - self.iteration / self.warmup) * 0.9
        clip = ((batch["clip"].double() - MEAN) / STD).permute(0, 4, 1, 2, 3)
        logits = self.model(clip)
        chosen = logits[torch.arange(BATCH), batch["label"]]
        loss = (logits.exp().sum(1).log() - chosen).sum() / BATCH
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        norm = sum((gradient**2).sum() for gradient in gradients).sqrt()
        scale = min(1.0, self.max_norm / (norm.item() + 1e-6))
        with torch.no_grad():
            for index, (weight, gradient) in enumerate(zip(self.model.parameters(), gradients, strict=True)):
                update = gradient * scale + self.decay * weight
                last = self.velocity[index]
                self.velocity[index] = update if last is None else self.momentum * last + update
                if self.nesterov:
                    update = update + self.momentum * self.velocity[index]
                else:
                    update = self.velocity[index]
                weight -= lr * update
        self.iteration += 1
        return {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}


@pytest.mark.parametrize(
    ("count", "overrides", "plain"),
    [
        (1, [], {}),
        (10, [], {}),
        (10, ["optimizer_config.grad_clip.max_norm=0.5"], {"max_norm": 0.5}),
        (10, ["optimizer.nesterov=True"], {"nesterov": True}),
    ],
    ids=["one step", "ten steps", "ten clipped steps", "ten steps of Nesterov's form"],
)
def test_steps_equal_the_recipe_written_out(count, overrides, plain, monkeypatch):
    settings = _settings(*overrides)
    model, reference = _model(), PlainRecipe(_model(), **plain)
    model.train()
    step = TrainingStep(model, settings.optimizer, settings.model.network.normalization)
    monkeypatch.setattr("slowfast_ext.training.step.normalize", _normalize64)
    rate = LearningRate(settings.optimizer, settings.schedule, settings.epochs)
    for iteration, batch in enumerate(_batches(settings, count)):
        lr = rate(iteration // ITERATIONS, iteration, ITERATIONS)
        found, expected = step(batch, lr), reference.step(batch)
        # float64; each step multiplies the roundoff of those before.
        assert lr == pytest.approx(expected["lr"], rel=1e-12)
        assert found["loss"].item() == pytest.approx(expected["loss"], rel=1e-9)
        assert found["grad_norm"].item() == pytest.approx(expected["grad_norm"], rel=1e-9)
        assert expected["grad_norm"] > plain.get("max_norm", 0)  # else the case of the small norm tests nothing
    for name, value in reference.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert model.backbone.slow_path.conv1.bn.num_batches_tracked == count
    start = _model().state_dict()
    assert not model.state_dict()["backbone.slow_path.conv1.bn.running_mean"].equal(
        start["backbone.slow_path.conv1.bn.running_mean"]
    )


def _normalize64(pixels, mean, std):
    return ((pixels.double() - torch.tensor(mean)) / torch.tensor(std)).permute(0, 4, 1, 2, 3)


def test_accumulated_batches_make_the_update_of_their_mean_gradient():
    """Batch norm sees each batch by itself, hence the mean of the gradients and not the gradient of a larger batch."""
    settings = _settings()
    batches = _batches(settings, 3)
    model, reference = _model().float().train(), _model().float().train()
    step = TrainingStep(model, settings.optimizer, settings.model.network.normalization)
    for index, batch in enumerate(batches):
        result = step(batch, 0.05, parts=3, update=index == 2)
        assert ("grad_norm" in result) == (index == 2)
    losses = 0
    for batch in batches:
        clip = ((batch["clip"].float() - MEAN) / STD).permute(0, 4, 1, 2, 3)
        losses = losses + F.cross_entropy(reference(clip), batch["label"])
    gradients = torch.autograd.grad(losses / 3, list(reference.parameters()))
    for (name, weight), other, gradient in zip(
        model.named_parameters(), reference.parameters(), gradients, strict=True
    ):
        expected = other - 0.05 * (gradient + 1e-4 * other)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_sixteen_bit_arithmetic_keeps_float32_weights_and_stays_near(amp):
    settings = _settings()
    # In bfloat16 oneDNN's gradient of a kernel that is longer than the clip has what lies in fresh memory: no 2 frames.
    batch = _batches(settings, 1, size=32, frames=16)[0]
    losses, norms = {}, {}
    for kind in (None, amp):
        model = _model().float().train()
        step = TrainingStep(model, settings.optimizer, settings.model.network.normalization, amp=kind)
        result = step(batch, 0.05)
        losses[kind], norms[kind] = result["loss"].item(), result["grad_norm"].item()
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses[amp] != losses[None]
    assert losses[amp] == pytest.approx(losses[None], rel=0.05)
    assert norms[amp] == pytest.approx(norms[None], rel=0.2)  # not that of the scaled loss


def test_label_smoothing_spreads_a_share_of_the_label():
    settings = _settings("model.cls_head.label_smooth_eps=0.2")
    assert settings.model.label_smoothing == 0.2
    batch = _batches(settings, 1)[0]
    model = _model().float().train()
    with torch.no_grad():
        clip = ((batch["clip"].float() - MEAN) / STD).permute(0, 4, 1, 2, 3)
        logits = _model().float().train()(clip)
    target = torch.full((BATCH, 3), 0.2 / 3)
    target[torch.arange(BATCH), batch["label"]] += 0.8
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    step = TrainingStep(model, settings.optimizer, settings.model.network.normalization, label_smoothing=0.2)
    assert step(batch, 0.05)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
