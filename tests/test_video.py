import cv2
import numpy as np
import pandas as pd
import pytest

from ecan_fastai.video import (
    FaceTracker,
    VideoWriter,
    camera_index,
    draw_faces,
    frame_rate,
    is_video,
    video_frames,
)


class Played:
    "A video that `cv2` opened; tests replace some of its methods"

    capture = cv2.VideoCapture

    def __init__(self, file):
        self.video, self.i = self.capture(file), -1

    def grab(self):
        self.i += 1
        return self.video.grab()

    def __getattr__(self, name):
        return getattr(self.video, name)


def grey_video(file, n=25, rate=10):
    with VideoWriter(file, rate) as video:
        for i in range(n):
            video.write(i / rate, np.full((48, 64, 3), 10 * i % 256, np.uint8))
    return file


def test_frames_are_taken_at_regular_times(tmp_path):
    file = grey_video(tmp_path / "v.avi")
    seconds, frames = zip(*video_frames(file, 0.5))
    assert list(seconds) == [0, 0.5, 1, 1.5, 2]
    assert all(abs(int(f.mean()) - 100 * s) < 5 for s, f in zip(seconds, frames))
    assert len(list(video_frames(file, 10))) == 1
    assert len(list(video_frames(file, 0.01))) == len(list(video_frames(file, 0))) == 25
    assert [round(s, 1) for s, _ in video_frames(file, 0.75)] == [0, 0.8, 1.5, 2.3]
    assert [round(s, 1) for s, _ in video_frames(file, 0.5, seconds=1.2)] == [0, 0.5, 1]


def test_a_camera_is_read_for_so_many_seconds_by_the_real_clock(tmp_path, monkeypatch):
    "A video of 1000 frames stands in for the camera: only the clock can end it so early"
    import time

    file, opened, now = grey_video(tmp_path / "v.avi", 1000), [], [0.0]
    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: opened.append(source) or capture(str(file)))

    def clock():
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr(time, "monotonic", clock)
    seconds = [s for s, _ in video_frames("webcam:1", 0.1, seconds=0.55)]
    assert seconds == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5], abs=0.011) and set(opened) == {1}
    with pytest.raises(ValueError, match="a camera has no end"):
        list(video_frames("webcam"))
    seconds = []
    for second, _ in video_frames("webcam", 0.1, seconds=0.95):
        seconds.append(second)
        now[0] += 0.33 * (len(seconds) == 3)  # a pause after the third frame
    assert np.diff(seconds)[2] > 0.33 and all(gap > 0.05 for gap in np.diff(seconds))


def test_names_of_cameras_and_videos(tmp_path, monkeypatch):
    assert camera_index("webcam") == 0 and camera_index("webcam:12") == 12
    assert camera_index("webcam.jpg") is None and camera_index(3) is None and is_video("a.MP4") and is_video("webcam")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "webcam").mkdir()
    assert camera_index("webcam") is None  # a folder of that name is a folder


def box(x, side=100):
    return x, 0, x + side, side


def test_numbers_follow_the_faces_whatever_their_order():
    tracker = FaceTracker()
    assert tracker.update(0, [box(0), box(300)], [[1, 0], [0, 1]])[0] == [1, 2]
    assert tracker.update(0.1, [box(310), box(20)], [[0, 1], [1, 0]])[0] == [2, 1]
    assert tracker.update(0.2, [], np.empty((0, 2)))[0] == []
    assert tracker.update(0.9, [box(600), box(30)], [[0, 1], [1, 0]])[0] == [3, 1]  # 0.8 s unseen: the same face
    assert tracker.update(2.5, [box(600), box(310)], [[0, 1], [1, 0]])[0] == [3, 4]  # 3 was in the frame before, 2 not
    # two candidates: the larger overlap wins, and the other is a new face
    assert tracker.update(2.6, [box(630), box(605)], [[0, 1], [1, 0]])[0] == [5, 3]


def test_a_face_that_overlaps_little_is_another_one():
    for shift, numbers in ((50, [1]), (60, [2])):  # overlaps of 1/3 and 1/4; the least is 0.3
        tracker = FaceTracker()
        tracker.update(0, [box(0)], [[1, 0]])
        assert tracker.update(0.1, [box(shift)], [[1, 0]])[0] == numbers


def test_smoothing_is_the_exponential_of_time_at_any_frame_rate():
    for step in (0.1, 0.5):
        tracker = FaceTracker(smoothing=0.7)
        tracker.update(0, [box(0)], [[1.0, 0.0]])
        for i in range(1, round(1 / step) + 1):
            _, probs = tracker.update(i * step, [box(0)], [[0.0, 1.0]])
        assert probs[0] == pytest.approx([np.exp(-1 / 0.7), 1 - np.exp(-1 / 0.7)])
    tracker = FaceTracker(smoothing=0)
    tracker.update(0, [box(0)], [[1.0, 0.0]])
    assert tracker.update(0.1, [box(0)], [[0.3, 0.7]])[1].tolist() == [[0.3, 0.7]]


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".webm"])
def test_a_written_video_keeps_time(tmp_path, suffix):
    "A frame at 0, 0.2 and 1 s, ten frames a second: the second one is shown from 0.2 s on, until the third comes"
    with VideoWriter(tmp_path / f"v{suffix}", 10) as video:
        for second, grey in ((0, 0), (0.2, 100), (1, 200)):
            video.write(second, np.full((48, 64, 3), grey, np.uint8))
    found = [round(f.mean()) for _, f in video_frames(tmp_path / f"v{suffix}", 0)]
    assert found == pytest.approx([0, 0, *[100] * 8, 200], abs=20)


def test_of_two_frames_in_one_place_the_first_is_written_and_the_last_goes_on(tmp_path):
    with VideoWriter(tmp_path / "v.avi", 10) as video:
        for second, grey in ((0.3, 50), (0.32, 120), (0.6, 200)):
            video.write(second, np.full((48, 64, 3), grey, np.uint8))
    found = [round(f.mean()) for _, f in video_frames(tmp_path / "v.avi", 0)]
    assert found == pytest.approx([50, 50, 50, 50, 120, 120, 200], abs=5)


@pytest.mark.parametrize("said", [0, -1, 1000, 90_000, float("nan")])
def test_a_video_that_does_not_say_its_rate_has_25_frames_a_second(tmp_path, monkeypatch, said):
    with VideoWriter(tmp_path / "v.avi", 10) as video:
        for second in (0, 0.2):
            video.write(second, np.zeros((48, 64, 3), np.uint8))

    class Silent(Played):
        def get(self, prop):
            return {cv2.CAP_PROP_FPS: said, cv2.CAP_PROP_POS_MSEC: 0.0}.get(prop, self.video.get(prop))

    monkeypatch.setattr(cv2, "VideoCapture", Silent)
    assert frame_rate(tmp_path / "v.avi") == 25
    assert [second for second, _ in video_frames(tmp_path / "v.avi", 0)] == pytest.approx([0, 0.04, 0.08])


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".webm"])
def test_a_video_that_a_full_disk_cuts_short_is_an_error_and_the_old_file_stays(tmp_path, full_disk, suffix):
    file, rng = tmp_path / f"v{suffix}", np.random.default_rng(0)
    file.write_text("old")
    with full_disk(100_000), pytest.raises(OSError, match=f"cannot write {file}: only .* of 40 frames are in it"):
        with VideoWriter(file, 25) as video:
            for i in range(40):
                video.write(i / 25, rng.integers(0, 255, (240, 320, 3), dtype=np.uint8))
    assert file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("n", [25, 40])
def test_a_video_that_lost_only_its_end_is_an_error_too(tmp_path, full_disk, n):
    "The header of a WebM file says how many frames there should be, however many there are"
    file, rng = tmp_path / "v.webm", np.random.default_rng(0)
    images = rng.integers(0, 255, (n, 96, 128, 3), dtype=np.uint8)

    def write():
        with VideoWriter(file, 25) as video:
            for i, image in enumerate(images):
                video.write(i / 25, image)

    write()
    size = file.stat().st_size
    with full_disk(int(0.9 * size)), pytest.raises(OSError, match=f"of {n} frames are in it; is the disk full"):
        write()
    assert file.stat().st_size == size


def test_a_frame_of_another_size_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"frames of shape \(48, 64, 3\), got \(48, 60, 3\)"):
        with VideoWriter(tmp_path / "v.avi", 25) as video:
            for i, width in enumerate((64, 60)):
                video.write(i / 25, np.zeros((48, width, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_wrong_names_and_values(tmp_path):
    with pytest.raises(ValueError, match="ending in .mp4, .avi or .webm, got v.gif"):
        VideoWriter("v.gif", 10)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        VideoWriter(tmp_path / "none" / "v.mp4", 10)
    with pytest.raises(ValueError, match="smoothing: expected"):
        FaceTracker(smoothing=-1)
    (tmp_path / "v.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="v.mp4: not a video"):
        list(video_frames(tmp_path / "v.mp4"))


def test_drawing_changes_the_frame_of_the_box_and_takes_any_class_name():
    image = np.zeros((200, 200, 3), np.uint8)
    row = dict(left=50.0, top=60.0, right=150.0, bottom=160.0, label="fröhlich $x$", probability=0.5)
    drawn = draw_faces(image, pd.DataFrame([{**row, "track": pd.NA}]))
    assert (image == 0).all() and (drawn[60, 60:140] == drawn[60, 60]).all() and drawn[60, 60].any()
    assert (drawn[80:140, 70:130] == 0).all() and drawn[:60].any()
    numbered = draw_faces(image, pd.DataFrame([{**row, "track": 12}]))
    assert (numbered[:60] > 0).sum() > (drawn[:60] > 0).sum()
    assert (draw_faces(image, pd.DataFrame([{**row, "track": 1}]).iloc[:0]) == 0).all()


def test_a_label_at_the_right_edge_is_drawn_whole():
    image, row = (
        np.zeros((200, 400, 3), np.uint8),
        dict(top=60.0, bottom=160.0, label="happy", probability=0.5, track=1),
    )
    widths = []
    for left in (100.0, 380.0):
        drawn = draw_faces(image, pd.DataFrame([{**row, "left": left, "right": left + 15}]))
        widths.append(int(drawn[:58].any((0, 2)).sum()))  # columns of the label above the box
    assert abs(widths[0] - widths[1]) <= 2 and widths[0] > 20


def test_a_file_gives_the_times_of_its_frames(tmp_path, monkeypatch):
    "Here frames are 0.1 s apart at first, then 0.5 s, as in recordings of a screen"
    file, times = grey_video(tmp_path / "v.avi", 20), [0.1 * i if i < 10 else 0.9 + 0.5 * (i - 9) for i in range(20)]

    class Varying(Played):
        def get(self, prop):
            return 1000 * times[self.i] if prop == cv2.CAP_PROP_POS_MSEC else self.video.get(prop)

    monkeypatch.setattr(cv2, "VideoCapture", Varying)
    assert [s for s, _ in video_frames(file, 0)] == pytest.approx(times)
    assert [s for s, _ in video_frames(file, 1)] == pytest.approx([0, 1.4, 2.4, 3.4, 4.4, 5.4])


def test_times_that_start_again_go_on(tmp_path):
    "Two recordings in one file, as `cat` joins them"
    parts = []
    for grey in (20, 150):
        file = tmp_path / f"{grey}.mpg"
        video = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"PIM1"), 25, (64, 48))
        for i in range(50):
            video.write(np.full((48, 64, 3), grey + i, np.uint8))
        video.release()
        parts.append(file.read_bytes())
    (tmp_path / "joined.mpg").write_bytes(b"".join(parts))
    seconds, frames = zip(*video_frames(tmp_path / "joined.mpg", 0))
    assert len(seconds) >= 99 and all(0.03 < gap < 0.09 for gap in np.diff(seconds))
    assert [round(s, 1) for s, _ in video_frames(tmp_path / "joined.mpg", 1)][:4] == [0, 1, 2, 3]
    with VideoWriter(tmp_path / "copy.avi", 25) as copy:
        for second, frame in zip(seconds, frames):
            copy.write(second, frame)
    greys = [f.mean() for _, f in video_frames(tmp_path / "copy.avi", 0)]
    assert len(set(np.round(greys[52:]))) > 40  # no still


def test_a_track_needs_times_that_increase():
    tracker = FaceTracker()
    tracker.update(1, [box(0)], [[1, 0]])
    with pytest.raises(ValueError, match="second: expected a frame after 1 s, got 1"):
        tracker.update(1, [box(0)], [[1, 0]])


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".webm"])
def test_a_frame_of_odd_size_keeps_its_last_row_and_column(tmp_path, suffix):
    frame = np.zeros((49, 63, 3), np.uint8)
    frame[32:, 40:] = 255
    with VideoWriter(tmp_path / f"v{suffix}", 10) as video:
        video.write(0, frame)
    ((_, found),) = video_frames(tmp_path / f"v{suffix}", 0)
    assert found.shape == (50, 64, 3) and found[48, 62].min() > 200 and found[8, 8].max() < 50


def test_a_video_of_varying_rate_is_not_called_damaged(tmp_path, monkeypatch, recwarn):
    "A file that counts as frames its duration at the nominal rate, as Matroska does"
    file = grey_video(tmp_path / "v.avi", 20)

    class Sparse(Played):
        def get(self, prop):
            said = {cv2.CAP_PROP_POS_MSEC: 500 * self.i, cv2.CAP_PROP_FRAME_COUNT: 100}
            return said.get(prop, self.video.get(prop))

    monkeypatch.setattr(cv2, "VideoCapture", Sparse)
    assert len(list(video_frames(file, 0))) == 20 and not [w for w in recwarn if "damaged" in str(w.message)]


def test_a_damaged_video_is_said(tmp_path, monkeypatch):
    file = grey_video(tmp_path / "v.avi", 40)

    class Damaged(Played):
        def grab(self):
            return self.i < 9 and super().grab()

    monkeypatch.setattr(cv2, "VideoCapture", Damaged)
    with pytest.warns(UserWarning, match="v.avi ends after 1.0 of 4.0 seconds: it is cut short or damaged"):
        assert len(list(video_frames(file, 0))) == 10
    assert len(list(video_frames(file, 0, seconds=0.5))) == 5  # stopped here, not damaged
    with pytest.raises(ValueError, match="every: expected 0 or more seconds"):
        list(video_frames(file, float("inf")))


@pytest.mark.parametrize(
    "suffix, codec", [(".3gp", "mp4v"), (".flv", "FLV1"), (".m2ts", "MPG2"), (".mpg", "MPG1"), (".wmv", "WMV2")]
)
def test_containers_of_cameras_and_older_systems_are_read(tmp_path, suffix, codec):
    file = tmp_path / f"v{suffix}"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*codec), 25, (64, 48))
    for i in range(25):
        writer.write(np.full((48, 64, 3), 10 * i, np.uint8))
    writer.release()
    seconds, frames = zip(*video_frames(file, 0.4))
    assert is_video(file) and seconds == pytest.approx((0, 0.4, 0.8), abs=0.01)
    assert [frame.mean() for frame in frames] == pytest.approx([0, 100, 200], abs=12)
