import cv2
import numpy as np
import pytest

from slowfast_ext.data import FrameFolder, VideoError, check_filename_template


@pytest.fixture
def folder(tmp_path):
    """Frames 3 to 12, of which the red channel says the number times 20."""
    for number in range(3, 13):
        picture = np.full((24, 32, 3), (0, 0, number * 20), np.uint8)  # BGR
        cv2.imwrite(str(tmp_path / f"frame{number:03}.png"), picture)
    return tmp_path


def test_frames_are_those_whose_names_have_the_number(folder):
    video = FrameFolder(folder, 10, filename_template="frame{:03}.png", start_index=3)
    frames = video.frames([9, 0, 4, 4])
    assert frames.shape == (4, 24, 32, 3)
    assert frames.dtype == np.uint8
    assert frames[:, 0, 0].tolist() == [[240, 0, 0], [60, 0, 0], [140, 0, 0], [140, 0, 0]]


def test_an_offset_leaves_out_the_first_frames(folder):
    video = FrameFolder(folder, 5, filename_template="frame{:03}.png", start_index=3, offset=5)
    assert len(video) == 5
    assert video.frames([0, 4])[:, 0, 0, 0].tolist() == [160, 240]
    with pytest.raises(IndexError):
        video.frames([5])


def test_faults_are_named_with_their_frame(folder, tmp_path):
    with pytest.raises(VideoError, match=r"'.*nothing': there is no such folder"):
        FrameFolder(folder / "nothing", 3)
    with pytest.raises(VideoError, match="it is a file, not a folder"):
        FrameFolder(folder / "frame004.png", 3)
    with pytest.raises(VideoError, match=r"it has no frame 'img_00001.jpg'"):
        FrameFolder(folder, 3).frames([0])
    video = FrameFolder(folder, 4, filename_template="frame{:03}.png", start_index=3)
    for number, content in [(3, b""), (4, b"no picture")]:
        (folder / f"frame{number:03}.png").write_bytes(content)
        with pytest.raises(VideoError, match=rf"its frame 'frame{number:03}.png' is not a picture"):
            video.frames([number - 3])
    cv2.imwrite(str(folder / "frame005.png"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(VideoError, match="changes size on the way"):
        video.frames([2, 3])


def test_a_jpeg_that_is_cut_short_is_not_filled_with_grey(tmp_path):
    path = tmp_path / "img_00001.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert FrameFolder(tmp_path, 1).frames([0]).shape == (1, 64, 64, 3)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(VideoError, match=r"its frame 'img_00001.jpg' is cut short"):
        FrameFolder(tmp_path, 1).frames([0])


@pytest.mark.parametrize("template", ["img.jpg", "img_%05d.jpg", "{:05}_{:05}.jpg", "{name}.jpg", "{:q}.jpg", "{"])
def test_a_template_without_one_number_is_rejected(template):
    with pytest.raises(ValueError, match="filename_template must have one field for the frame number"):
        check_filename_template(template)


@pytest.mark.parametrize("template", ["img_{:05}.jpg", "{}.png", "flow_x_{:d}.jpg", "{0:06d}.jpg"])
def test_any_template_with_a_number_is_accepted(template):
    check_filename_template(template)
