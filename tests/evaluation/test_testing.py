import numpy as np
import pytest
import torch
from sample_videos import write_video
from small_networks import lively_model, small_config
from tolerances import tolerance
from torch import nn

from slowfast_ext.data import ClipSampling, SpatialTransform, VideoDataset
from slowfast_ext.evaluation.inference import PlainEngine, fold_batch_norms
from slowfast_ext.evaluation.testing import score_videos

CPU = {"dtype": torch.float32, "max_views": 2}


@pytest.mark.parametrize("lateral_norm", [False, True])
def test_folding_leaves_no_batch_norm_and_the_same_function(lateral_norm):
    model = lively_model(small_config(18, 18, lateral_norm=lateral_norm))
    clip = torch.randn(1, 3, 8, 32, 32)
    with torch.inference_mode():
        expected = model(clip)
        folded = fold_batch_norms(model)(clip)
    assert not any(isinstance(module, nn.BatchNorm3d) for module in model.modules())
    scale = max(1.0, expected.std().item())
    torch.testing.assert_close(folded, expected, **tolerance(torch.float32, 2 * 18 * 64, roundings=3, scale=scale))


class _Brightness:
    """Two classes: how bright and how dark a clip is."""

    device, max_views = torch.device("cpu"), None

    def __init__(self):
        self.batches = []

    def __call__(self, clip):
        self.batches.append(len(clip))
        brightness = clip.float().mean((1, 2, 3, 4)) / 255
        return torch.stack([brightness, 1 - brightness], 1)


def test_views_of_several_videos_share_passes_of_the_given_size(tmp_path):
    for name in "abc":
        write_video(tmp_path / f"{name}.mp4", 10)
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 1\nc.mp4 0\n")
    sampling, transform = ClipSampling(4, 1, num_clips=2), SpatialTransform(32, 32, "three")
    dataset = VideoDataset(tmp_path / "list.txt", tmp_path, sampling=sampling, transform=transform, test=True)
    engine = _Brightness()
    found = list(score_videos(engine, dataset, [2, 0, 1], average=None, videos=2, views=5, workers=1))
    assert engine.batches == [5, 5, 2, 5, 1]  # 12 views of two videos, 6 of the last
    assert [video.index for video in found] == [2, 0, 1]
    for video in found:
        assert np.array_equal(video.scores, _Brightness()(dataset[video.index].clip[:]).numpy())
    for average, expected in (("score", lambda rows: rows), ("prob", lambda rows: rows.softmax(1))):
        mean = expected(torch.from_numpy(found[0].scores)).mean(0)
        (video,) = score_videos(engine, dataset, [2], average=average, workers=1)
        torch.testing.assert_close(torch.from_numpy(video.scores), mean, rtol=0, atol=1e-6)


def test_scores_that_are_no_numbers_are_an_error_of_their_video(tmp_path):
    model = lively_model(small_config(18, 18))
    with torch.no_grad():
        model.head.fc_cls.bias[0] = torch.nan
    write_video(tmp_path / "a.mp4", 10)
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    sampling, transform = ClipSampling(8, 1), SpatialTransform(32, 32, "center")
    dataset = VideoDataset(tmp_path / "list.txt", tmp_path, sampling=sampling, transform=transform, test=True)
    (video,) = score_videos(PlainEngine(model, **CPU), dataset, [0], workers=1)
    assert (video.index, video.scores) == (0, None)
    assert "not finite" in video.error
    assert list(score_videos(PlainEngine(model, **CPU), dataset, [])) == []
    with pytest.raises(ValueError, match="average must be one of"):
        next(score_videos(PlainEngine(model, **CPU), dataset, [0], average="mean"))
