import json

import cv2
import numpy as np
import pandas as pd
import pytest
from matplotlib.cbook import get_sample_data

from ecan_fastai.cli import ecan_predict
from ecan_fastai.config import RunConfig
from ecan_fastai.data import read_face
from ecan_fastai.detector import FaceFinder, _upright, media_files, video_frames
from ecan_fastai.inference import Predictor
from ecan_fastai.runs import start_run

PHOTO = get_sample_data("grace_hopper.jpg", asfileobj=False)


@pytest.fixture(scope="module")
def photo():
    return read_face(PHOTO)[:420, 100:420]


@pytest.fixture(scope="module")
def finder():
    return FaceFinder(device="cpu")


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    start_run(
        RunConfig(
            str(faces),
            size=48,
            channels=1,
            recipe="fer2013",
            level="weak",
            epochs=1,
            bs=16,
            opt="adam",
            momentum=0.9,
            workers=0,
        ),
        out,
    )
    return out


def rotated(img, angle):
    "Turned clockwise by `angle` around the middle"
    h, w = img.shape[:2]
    return cv2.warpAffine(img, cv2.getRotationMatrix2D((w / 2, h / 2), -angle, 1), (w, h))


def video(path, frames, rate=10):
    h, w = frames[0].shape[:2]
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, (w, h))
    for f in frames:
        out.write(np.ascontiguousarray(f[..., ::-1]))
    out.release()
    return path


def test_a_face_is_found_where_it_is(photo, finder):
    (face,) = finder(photo)
    assert (
        face.found > 0.99
        and 45 < face.left < 85
        and 90 < face.top < 130
        and 225 < face.right < 265
        and 320 < face.bottom < 360
    )
    assert (
        face.image.shape == (round(max(face.right - face.left, face.bottom - face.top)),) * 2 + (3,)
        and face.image.dtype == np.uint8
    )


def test_the_cut_out_is_exact():
    img = np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)
    box = (10.0, 20.0, 50.0, 60.0)
    level, right, upside_down = (
        [(20, 30), (40, 30)],
        [(40, 30), (40, 50)],
        [(40, 50), (20, 50)],
    )  # the left eye of the picture first
    for eyes, turns, angle in ((level, 0, 0), (right, 1, 90), (upside_down, 2, 180)):
        face, found = _upright(img, box, eyes, 0)
        assert found == angle and np.array_equal(face, np.rot90(img[20:60, 10:50], turns))
    wider, _ = _upright(img, box, level, 0.5)
    assert np.array_equal(wider, img[10:70, 0:60])
    outside, _ = _upright(img, (-10.0, 20.0, 30.0, 60.0), level, 0)
    assert np.array_equal(outside[:, 10:], img[20:60, :30]) and np.array_equal(
        outside[:, :10], np.repeat(img[20:60, :1], 10, 1)
    )
    assert _upright(img, (5.0, 5.0, 25.0, 45.0), level, 0)[0].shape == (40, 40, 3)  # the longer side


@pytest.mark.parametrize("angle", [-25, 15, 25])
def test_a_tilted_face_comes_out_upright(photo, finder, angle):
    (straight,) = finder(photo)
    (face,) = finder(rotated(photo, angle))
    assert face.angle - straight.angle == pytest.approx(angle, abs=4)
    small = [cv2.resize(f.image, (48, 48), interpolation=cv2.INTER_AREA).astype(int) for f in (straight, face)]
    tilted = cv2.resize(rotated(straight.image, angle), (48, 48), interpolation=cv2.INTER_AREA)
    assert np.abs(small[0] - small[1]).mean() < 0.7 * np.abs(small[0] - tilted).mean()


def test_margin_shows_more(photo):
    a, b = FaceFinder(device="cpu")(photo)[0], FaceFinder(margin=0.5, device="cpu")(photo)[0]
    assert b.image.shape[0] == pytest.approx(1.5 * a.image.shape[0], abs=1) and (a.left, a.bottom) == (b.left, b.bottom)


def test_no_face_several_faces_and_the_threshold(photo, finder):
    assert finder(np.full((200, 300, 3), 120, np.uint8)) == [] and finder(np.zeros((20, 20, 3), np.uint8)) == []
    assert finder(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)) == []
    half = cv2.resize(photo, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    two = np.zeros((420, 500, 3), np.uint8)
    two[:, :320], two[100:310, 330:490] = photo, half
    large, small = finder(two)
    assert large.image.shape[0] > 1.7 * small.image.shape[0] and large.right < 320 < small.left
    assert len(FaceFinder(min_size=300, device="cpu")(two)) == 1
    assert FaceFinder(threshold=0.9999999, device="cpu")(rotated(two, 40)) == []


def test_frames_are_taken_at_regular_times(tmp_path):
    file = video(tmp_path / "v.avi", [np.full((48, 64, 3), 10 * i, np.uint8) for i in range(25)])
    seconds, frames = zip(*video_frames(file, 0.5))
    assert list(seconds) == [0, 0.5, 1, 1.5, 2] and all(
        abs(int(f.mean()) - 100 * s) < 5 for s, f in zip(seconds, frames)
    )
    assert (
        len(list(video_frames(file, 10))) == 1
        and len(list(video_frames(file, 0.01))) == 25
        and [round(s, 1) for s, _ in video_frames(file, 0.75)] == [0, 0.8, 1.5, 2.3]
    )


def test_faces_of_photos_and_videos_are_labelled_as_cut_out(photo, finder, run, tmp_path):
    predictor = Predictor(run)
    cv2.imwrite(str(tmp_path / "a.png"), photo[..., ::-1])
    cv2.imwrite(str(tmp_path / "b.png"), np.full((99, 99, 3), 50, np.uint8))
    video(tmp_path / "c.avi", [np.zeros_like(photo)] * 10 + [photo] * 11)
    table = predictor.predict_faces(tmp_path, finder)
    assert (
        [s.rsplit("/")[-1] for s in table["image"]] == ["a.png", "c.avi", "c.avi"]
        and np.isnan(table["second"][0])
        and list(table["second"][1:]) == [1, 2]
    )
    (face,) = finder(photo)
    assert np.allclose(table.loc[0, predictor.columns].astype(float), predictor.probabilities(face.image)[0], atol=1e-5)
    assert table.loc[0, ["left", "top", "right", "bottom"]].tolist() == pytest.approx(
        [face.left, face.top, face.right, face.bottom]
    )
    none = predictor.predict_faces(tmp_path / "b.png", finder)
    assert len(none) == 0 and list(none.columns) == list(table.columns)


def test_ecan_predict_with_faces(photo, run, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    cv2.imwrite(str(photos / "a.png"), photo[..., ::-1])
    cv2.imwrite(str(photos / "b.png"), np.full((99, 99, 3), 50, np.uint8))
    ecan_predict([str(run), str(photos), "--faces"])
    said = capsys.readouterr()
    assert "a.png" in said.out and "second" not in said.out and f"no face found in {photos / 'b.png'}" in said.err
    ecan_predict(
        [
            str(run),
            str(video(tmp_path / "v.avi", [photo] * 11)),
            "--faces",
            "--every",
            "0.5",
            "--out",
            str(tmp_path / "o.csv"),
        ]
    )
    assert list(pd.read_csv(tmp_path / "o.csv")["second"]) == [0, 0.5, 1]
    ecan_predict([str(run), str(photos / "a.png"), "--faces", "--out", str(tmp_path / "o.json")])
    (row,) = json.loads((tmp_path / "o.json").read_text())
    assert row["second"] is None and f"p_{row['label']}" in row
    ecan_predict([str(run), str(photos / "b.png"), "--faces"])
    assert "no face found" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args,said", [(["--every", "1"], "--every goes with --faces"), (["--faces", "--every", "0"], "seconds above 0")]
)
def test_what_is_wrong_is_said(run, tmp_path, args, said, capsys):
    file = video(tmp_path / "v.avi", [np.zeros((48, 48, 3), np.uint8)] * 3)
    with pytest.raises(SystemExit):
        ecan_predict([str(run), str(file), *args])
    assert said in capsys.readouterr().err


def test_broken_files_are_named(tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "v.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="v.mp4: not a video"):
        list(video_frames(tmp_path / "v.mp4"))
    with pytest.raises(FileNotFoundError, match="no such video file: .*w.mp4"):
        list(video_frames(tmp_path / "w.mp4"))
    with pytest.raises(ValueError, match="no images or videos found under"):
        media_files(tmp_path / "empty")
    for bad in (dict(threshold=1), dict(min_size=5)):
        with pytest.raises(ValueError):
            FaceFinder(**bad)


def test_without_the_extra_it_is_said(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'ecan_fastai\[faces\]'"):
        FaceFinder()
