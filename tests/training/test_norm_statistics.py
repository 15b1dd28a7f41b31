import copy

import pytest
import torch
from small_networks import small_config
from tolerances import tolerance
from torch import nn

from slowfast_ext.models import SubBatchNorm3d, build_model
from slowfast_ext.training.batch_norm import convert_batch_norm, sub_batch_norms
from slowfast_ext.training.precise_bn import update_statistics

SPLITS, CHANNELS = 3, 4


def _norm():
    norm = nn.BatchNorm3d(CHANNELS)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 1.5)
    return norm


def test_sub_batch_norm_is_batch_norm_of_each_part():
    norm = _norm()
    split = SubBatchNorm3d.from_batch_norm(copy.deepcopy(norm), SPLITS)
    parts = [copy.deepcopy(norm) for _ in range(SPLITS)]
    for _ in range(2):
        x = torch.randn(2 * SPLITS, CHANNELS, 2, 3, 3, requires_grad=True)
        y = split(x)
        expected = torch.empty_like(y)
        for index, part in enumerate(parts):
            expected[index::SPLITS] = part(x[index::SPLITS])
        torch.testing.assert_close(y, expected, **tolerance(torch.float32, 36, scale=1))
    assert split.num_batches_tracked == 2

    split.aggregate()
    means = torch.stack([part.running_mean for part in parts])
    variances = torch.stack([part.running_var for part in parts])
    close = tolerance(torch.float32, 36, scale=1)
    torch.testing.assert_close(split.running_mean, means.mean(0), **close)
    # Law of total variance over parts of equal size.
    torch.testing.assert_close(split.running_var, variances.mean(0) + ((means - means.mean(0)) ** 2).mean(0), **close)
    plain = copy.deepcopy(norm).eval()
    plain.load_state_dict(split.state_dict())
    x = torch.randn(5, CHANNELS, 2, 3, 3)
    torch.testing.assert_close(split.eval()(x), plain(x), rtol=0, atol=0)


def test_sub_batch_norm_shares_its_affine_parameters_between_the_parts():
    split = SubBatchNorm3d.from_batch_norm(_norm(), SPLITS)
    split(torch.randn(SPLITS, CHANNELS, 2, 3, 3)).square().sum().backward()
    assert split.weight.grad.shape == (CHANNELS,)
    assert split.weight.grad.abs().min() > 0


def test_other_splits_begin_with_copies_of_the_aggregate():
    split = SubBatchNorm3d.from_batch_norm(_norm(), 2)
    split(torch.randn(4, CHANNELS, 2, 3, 3))
    split.aggregate()
    split.set_splits(4)
    assert split.split_mean.equal(split.running_mean.repeat(4))
    assert split.split_var.equal(split.running_var.repeat(4))


def test_a_batch_that_cannot_be_split_is_an_error():
    with pytest.raises(ValueError, match="the batch must be a multiple of 2, got 3"):
        SubBatchNorm3d(CHANNELS, 2)(torch.randn(3, CHANNELS, 1, 2, 2))


def test_conversion_keeps_parameters_and_keys():
    model = build_model(small_config(18, 18))
    keys, parameters = list(model.state_dict()), list(model.parameters())
    convert_batch_norm(model, "sub_batch", 2)
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    norms = sub_batch_norms(model)
    assert len(norms) == sum(key.endswith("running_mean") for key in keys)


class _Chain(nn.Module):
    """Two batch norms, the second of what the first leaves."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.second = _norm(), nn.Conv3d(CHANNELS, CHANNELS, 1), _norm()

    def forward(self, x):
        return self.second(self.conv(self.first(x)).relu())


@pytest.mark.parametrize("convert", ["batch", "sub_batch"])
def test_precise_statistics_are_the_mean_over_batches_of_mean_and_unbiased_variance(convert):
    model = convert_batch_norm(_Chain().eval(), convert, 2)
    batches = [torch.randn(4, CHANNELS, 2, 3, 3) * scale for scale in (1, 2, 3, 100)]
    weights = {name: value.clone() for name, value in model.named_parameters()}
    update_statistics(model, batches, 3)

    plain = nn.BatchNorm3d(CHANNELS, momentum=1.0)
    plain.load_state_dict({**model.first.state_dict()})
    means, variances, hidden_means = [], [], []
    for x in batches[:3]:
        means.append(x.mean((0, 2, 3, 4)))
        variances.append(x.transpose(0, 1).flatten(1).var(1, unbiased=True))
        hidden_means.append(model.conv(plain(x)).relu().mean((0, 2, 3, 4)))
    close = tolerance(torch.float32, 72, scale=4)
    torch.testing.assert_close(model.first.running_mean, torch.stack(means).mean(0), **close)
    torch.testing.assert_close(model.first.running_var, torch.stack(variances).mean(0), **close)
    torch.testing.assert_close(model.second.running_mean, torch.stack(hidden_means).mean(0), **close)
    assert all(value.equal(weights[name]) for name, value in model.named_parameters())
    assert (model.first.momentum, model.training) == (0.1, False)
    if convert == "sub_batch":
        assert model.first.splits == 2
        assert model.first.split_mean.equal(model.first.running_mean.repeat(2))


def test_too_few_batches_for_precise_statistics_leave_the_old_ones():
    model = _Chain()
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    with pytest.raises(ValueError, match="must have at least 3 batches, got 2"):
        update_statistics(model, [torch.randn(2, CHANNELS, 2, 3, 3)] * 2, 3)
    assert all(value.equal(before[name]) for name, value in model.named_buffers() if "running" in name)
    assert model.first.momentum == 0.1
