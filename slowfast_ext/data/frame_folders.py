"""Videos that were unpacked to one picture file a frame."""

import os

import cv2
import numpy as np

from .decoding import Video, VideoError

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"


class FrameFolder(Video):
    """A folder of pictures, read like a video.

    Args:
        path: the folder.
        num_frames: of the video.
        filename_template: name of a picture, with one field for the number of its frame, as ``img_{:05}.jpg``.
        start_index: number in the name of the folder's first frame.
        offset: frames of the folder that come before the video.

    Raises:
        VideoError: there is no such folder.
    """

    fps = 0.0  # not stored

    def __init__(
        self,
        path: str | os.PathLike,
        num_frames: int,
        *,
        filename_template: str = "img_{:05}.jpg",
        start_index: int = 1,
        offset: int = 0,
    ):
        self.path = os.fspath(path)
        self._num_frames = num_frames
        self._template = filename_template
        self._first = start_index + offset
        if not os.path.isdir(self.path):
            found = "it is a file, not a folder" if os.path.exists(self.path) else "there is no such folder"
            raise VideoError(self.path, found)

    def __len__(self):
        return self._num_frames

    def _read(self, indices):
        for index in indices:
            yield self._picture(self._template.format(self._first + index))

    def _picture(self, name: str) -> np.ndarray:
        try:
            with open(os.path.join(self.path, name), "rb") as file:
                content = file.read()
        except FileNotFoundError:
            raise VideoError(self.path, f"it has no frame '{name}'") from None
        except OSError as error:
            raise VideoError(self.path, f"its frame '{name}' cannot be read: {error.strerror}") from error
        # OpenCV fills the missing part of a JPEG with grey and returns it as a picture.
        if content.startswith(_JPEG_START) and _JPEG_END not in content[-1024:]:
            raise VideoError(self.path, f"its frame '{name}' is cut short")
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
        if picture is None:
            raise VideoError(self.path, f"its frame '{name}' is not a picture")
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)

    def close(self):
        pass


def check_filename_template(template: str) -> None:
    """Raise ValueError unless the template names a different file for each frame number."""
    try:
        distinct = template.format(1) != template.format(2)
    except (IndexError, KeyError, ValueError):
        distinct = False
    if not distinct:
        raise ValueError(
            f"filename_template must have one field for the frame number, as 'img_{{:05}}.jpg', got {template!r}"
        )
