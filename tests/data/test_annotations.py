import json

import pytest

from slowfast_ext.data import Entry, read_annotations


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_a_list_of_video_files_has_a_path_and_labels_in_each_line(tmp_path):
    path = write(tmp_path / "list.txt", "a/one.mp4 3\r\n\n  b/two.mp4\t0 7 \n")
    assert read_annotations(path) == [
        Entry("a/one.mp4", (3,), None, 0, position=1),
        Entry("b/two.mp4", (0, 7), None, 0, position=3),
    ]


def test_a_list_of_folders_has_their_length_and_their_offset_where_asked_for(tmp_path):
    path = write(tmp_path / "list.txt", "\ufeffa/one 120 3\nb/two 7 300 2")
    assert read_annotations(path, raw_frames=True) == [
        Entry("a/one", (3,), 120, 0, position=1),
        Entry("b/two", (300, 2), 7, 0, position=2),
    ]
    path = write(tmp_path / "list.txt", "b/two 7 300 2 5")
    assert read_annotations(path, raw_frames=True, with_offset=True) == [Entry("b/two", (2, 5), 300, 7, position=1)]


def test_json_says_the_same(tmp_path):
    videos = [{"filename": "a b.mp4", "label": [3]}, {"filename": "c.mp4", "label": 4, "other": None}]
    path = write(tmp_path / "list.json", json.dumps(videos))
    assert read_annotations(path) == [Entry("a b.mp4", (3,), None, 0, 1), Entry("c.mp4", (4,), None, 0, 2)]
    folders = [{"frame_dir": "a", "total_frames": 9, "label": [1, 2], "offset": 5}]
    path = write(tmp_path / "list.JSON", json.dumps(folders))
    assert read_annotations(path, raw_frames=True) == [Entry("a", (1, 2), 9, 0, 1)]
    assert read_annotations(path, raw_frames=True, with_offset=True) == [Entry("a", (1, 2), 9, 5, 1)]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, ": the list must name at least one video, got none"),
        ("\n \n", {}, ": the list must name at least one video, got none"),
        ("a.mp4 1\nb.mp4", {}, ", line 2: the line must be 'path label [label ...]', got 'b.mp4'"),
        ("a 12", {"raw_frames": True}, ", line 1: the line must be 'path total_frames label [label ...]', got 'a 12'"),
        (
            "a 1 12",
            {"raw_frames": True, "with_offset": True},
            ", line 1: the line must be 'path offset total_frames label [label ...]', got 'a 1 12'",
        ),
        ("\n\na.mp4 x", {}, ", line 3: label must be a whole number (a path must hold no white space), got 'x'"),
        ("my video.mp4 2", {}, ", line 1: label must be a whole number (a path must hold no white space), got 'video"),
        ("a.mp4 399\nb.mp4 400", {"num_classes": 400}, ", line 2: label must be in [0, 400), got 400"),
        ("a.mp4 1 -1", {}, ", line 1: label must be at least 0, got -1"),
        ("a.mp4 1 2", {"multi_label": False}, ", line 1: the video must have one label unless multi_label is set, got"),
        ("a 0 1", {"raw_frames": True}, ", line 1: total_frames must be at least 1, got 0"),
        ("a -3 9 1", {"raw_frames": True, "with_offset": True}, ", line 1: offset must be at least 0, got -3"),
    ],
)
def test_a_wrong_list_is_rejected_with_file_line_and_value(tmp_path, text, options, message):
    path = write(tmp_path / "list.txt", text)
    with pytest.raises(ValueError, match="must ") as caught:
        read_annotations(path, **options)
    assert str(caught.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", ", line 1: the file must be JSON, got an error: "),
        ("{}", ": the file must hold a list, got dict"),
        ("[]", ": the list must name at least one video, got none"),
        ('[{"filename": "a", "label": 1}, {"filename": "b"}]', ", entry 2: the entry must be an object with filename,"),
        ('[{"filename": 3, "label": 1}]', ", entry 1: filename must be a string, got 3"),
        ('[{"filename": "a", "label": []}]', ", entry 1: label must hold at least one number, got []"),
        ('[{"filename": "a", "label": 1.5}]', ", entry 1: label must be a whole number, got 1.5"),
        ('[{"filename": "a", "label": [true]}]', ", entry 1: label must be a whole number, got True"),
        ('[{"filename": "a", "label": 5}]', ", entry 1: label must be in [0, 5), got 5"),
    ],
)
def test_wrong_json_is_rejected_with_file_entry_and_value(tmp_path, text, message):
    path = write(tmp_path / "list.json", text)
    with pytest.raises(ValueError, match="must ") as caught:
        read_annotations(path, num_classes=5)
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_binary_file_is_no_list(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"a.mp4 1\n\xff\xfe")
    with pytest.raises(ValueError, match="the list must be UTF-8 text, got other bytes at position 8"):
        read_annotations(path)


def test_offsets_belong_to_folders(tmp_path):
    with pytest.raises(ValueError, match="with_offset must be False for lists of video files, got True"):
        read_annotations(tmp_path / "list.txt", with_offset=True)
