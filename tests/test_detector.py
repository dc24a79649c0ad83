import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image
from small_runs import small_config
from test_video import Played

from ecan_fastai.cli import ecan_predict
from ecan_fastai.data import read_face
from ecan_fastai.detector import FaceFinder, _batches, _upright, accuracy_by_group, media_files, readable_media
from ecan_fastai.inference import Predictor
from ecan_fastai.runs import start_run
from ecan_fastai.video import VideoWriter, video_frames

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
    start_run(small_config(faces, size=48), out)
    return out


def rotated(img, angle):
    "Turned clockwise by `angle` around the middle"
    h, w = img.shape[:2]
    return cv2.warpAffine(img, cv2.getRotationMatrix2D((w / 2, h / 2), -angle, 1), (w, h))


def video(path, frames, rate=10):
    with VideoWriter(path, rate) as out:
        for i, f in enumerate(frames):
            out.write(i / rate, f)
    return path


def test_a_face_is_found_where_it_is(photo, finder):
    (face,) = finder(photo)
    assert (
        face.score > 0.99
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
    twice = predictor.predict_faces([tmp_path / "c.avi"] * 2, finder)  # each time a video of its own
    for other in (twice.iloc[2:], table.iloc[1:]):  # in batches of other sizes, so not to the last digit
        pd.testing.assert_frame_equal(twice.iloc[:2], other.reset_index(drop=True), rtol=0, atol=1e-4)


def test_ecan_predict_with_faces(photo, run, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    cv2.imwrite(str(photos / "a.png"), photo[..., ::-1])
    cv2.imwrite(str(photos / "b.png"), np.full((99, 99, 3), 50, np.uint8))
    ecan_predict(["--run", str(run), str(photos), "--faces"])
    said = capsys.readouterr()
    assert "a.png" in said.out and "second" not in said.out and f"no face found in {photos / 'b.png'}" in said.err
    ecan_predict(
        [
            "--run",
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
    ecan_predict(["--run", str(run), str(photos / "a.png"), "--faces", "--out", str(tmp_path / "o.json")])
    (row,) = json.loads((tmp_path / "o.json").read_text())
    assert row["second"] is None and f"p_{row['label']}" in row
    ecan_predict(["--run", str(run), str(photos / "b.png"), "--faces"])
    assert "no face found" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args,said",
    [
        (["--every", "1"], "--every has no effect without --faces"),
        (["--annotated", "a.mp4"], "--annotated has no effect without --faces"),
        (["--faces", "--every", "-1"], "every: expected 0 or more seconds"),
        (["--faces", "--seconds", "0"], "seconds: expected more than 0"),
        (["--faces", "--smoothing", "-1"], "smoothing: expected a time of 0 or more"),
        (["--faces", "--annotated", "a.gif"], "--annotated: expected a name ending in .png or .jpg"),
        (["--faces", "--heatmaps", "a.png"], "leave --faces out"),
        (["--by", "nobody.csv"], "no such file: nobody.csv"),
        ([], "v.avi is a video or a camera: add --faces"),
    ],
)
def test_what_is_wrong_is_said(run, tmp_path, args, said, capsys):
    file = video(tmp_path / "v.avi", [np.zeros((48, 48, 3), np.uint8)] * 3)
    with pytest.raises(SystemExit):
        ecan_predict(["--run", str(run), str(file), *args])
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


def test_a_table_of_people_needs_a_column_to_group_by():
    people = pd.DataFrame(dict(file=["a.png"], label=["happy"]))
    table = pd.DataFrame(dict(image=["a.png"], label=["happy"]))
    with pytest.raises(ValueError, match="the table of people has no column to group by"):
        accuracy_by_group(table, ["a.png"], people, ["happy", "sad"])


def test_large_frames_go_to_the_detector_in_smaller_batches():
    def sizes(height, width, n, n_frames=16):
        frame = np.broadcast_to(np.uint8(0), (height, width, 3))
        batches = list(_batches([(i, "v", 0.0, frame) for i in range(n)], n_frames))
        assert [i for batch in batches for i, *_ in batch] == list(range(n))
        return [len(batch) for batch in batches]

    assert sizes(240, 320, 40) == [16, 16, 8]
    assert sizes(2000, 3000, 5) == [2, 2, 1]  # 6 of 16.8 million pixels each
    assert sizes(6000, 8000, 2) == [1, 1]
    assert sizes(240, 320, 0) == []


def test_a_folder_of_photographs_with_a_link_to_itself_is_listed_once(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.JPG", "a.mp4", "more/c.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more" / "loop").symlink_to(tmp_path)
    (tmp_path / "z.png").symlink_to(tmp_path / "more" / "c.png")
    assert media_files(tmp_path) == [tmp_path / n for n in ("a.mp4", "b.JPG", "more/c.png")]


@pytest.mark.parametrize("option", [dict(every=1), dict(seconds=1), dict(smoothing=0.5)])
def test_options_of_a_video_are_refused_for_a_photograph(run, photo, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} has no effect without a video"):
        Predictor(run).predict_faces(photo, finder=lambda x: [], **option)


def test_without_the_extra_it_is_said(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(ImportError, match=r'pip install "ecan_fastai\[faces\]"'):
        FaceFinder()


def test_several_images_give_what_each_gives_alone(photo, finder):
    half = cv2.resize(photo, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    two = np.zeros_like(photo)
    two[:210, :160], two[210:, 160:] = half, half
    images = [photo, np.zeros_like(photo), two, half, half[:30, :30], photo]
    together, alone = finder.find(images), [finder(image) for image in images]
    assert [len(faces) for faces in together] == [1, 0, 2, 1, 0, 1]
    for a, b in zip(sum(together, []), sum(alone, [])):
        assert np.allclose([a.left, a.top, a.right, a.bottom], [b.left, b.top, b.right, b.bottom], atol=0.01)
        assert a.score == pytest.approx(b.score, abs=1e-4) and np.abs(a.image.astype(int) - b.image).max() <= 2


def moving(photo, n=12):
    "A face that moves to the right, 4 pixels a frame"
    frames = [np.zeros((420, 400, 3), np.uint8) for _ in range(n)]
    for i, frame in enumerate(frames):
        frame[:, 4 * i : 4 * i + 320] = photo
    return frames


@pytest.mark.slow
def test_a_face_of_a_video_keeps_its_number_and_its_probabilities_are_smoothed(photo, finder, run, tmp_path):
    file, predictor = video(tmp_path / "v.avi", moving(photo)), Predictor(run)
    raw = predictor.predict_faces(file, finder, every=0, smoothing=0)
    table = predictor.predict_faces(file, finder, every=0, smoothing=0.2)
    assert list(table["track"]) == [1] * 12 and np.allclose(table["second"], np.arange(12) / 10)
    expected = raw.loc[0, predictor.columns].to_numpy(float)
    for i in range(1, 12):
        share = 1 - np.exp(-0.1 / 0.2)
        expected = (1 - share) * expected + share * raw.loc[i, predictor.columns].to_numpy(float)
        assert np.allclose(table.loc[i, predictor.columns].to_numpy(float), expected, atol=1e-6)
    assert not np.allclose(table[predictor.columns], raw[predictor.columns], atol=1e-3)
    one_by_one = predictor.predict_faces(file, finder, every=0, smoothing=0.2, n_frames=1)
    assert np.allclose(one_by_one[predictor.columns], table[predictor.columns], atol=2e-3)
    assert len(predictor.predict_faces(file, finder, every=0, seconds=0.35)) == 4


def test_annotated_video_shows_the_box_where_the_face_is(photo, finder, run, tmp_path):
    file, predictor = video(tmp_path / "v.avi", moving(photo)), Predictor(run)
    table = predictor.predict_faces(file, finder, annotated=tmp_path / "out.avi")
    assert len(table) == 12  # every frame, unless told otherwise
    plain, drawn = (dict(video_frames(f, 0)) for f in (file, tmp_path / "out.avi"))
    assert list(plain) == pytest.approx(list(drawn)) and len(drawn) == 12
    for row, a, b in zip(table.to_dict("records"), plain.values(), drawn.values()):
        changed = np.abs(a.astype(int) - b).sum(-1) > 120
        x, y = np.where(changed.any(0))[0], np.where(changed.any(1))[0]
        assert abs(x.min() - row["left"]) < 6 and abs(y.max() - row["bottom"]) < 6
        inside = changed[
            round(row["top"]) + 12 : round(row["bottom"]) - 12, round(row["left"]) + 12 : round(row["right"]) - 12
        ]
        assert inside.mean() < 0.02
    predictor.predict_faces(photo, finder, annotated=tmp_path / "out.png")
    assert (np.abs(read_face(tmp_path / "out.png").astype(int) - photo).sum(-1) > 0).mean() < 0.1
    with pytest.raises(ValueError, match="expected one photograph or video"):
        predictor.predict_faces([photo, photo], finder, annotated=tmp_path / "out.png")


def test_accuracy_by_group_counts_by_hand(tmp_path):
    files = [tmp_path / folder / f"{name}.jpg" for folder in ("happy", "sad") for name in ("01", "02", "03")]
    files.append(tmp_path / "puzzled" / "01.jpg")
    table = pd.DataFrame(dict(image=[str(f) for f in files[:5]], label=["Happy", "sad", "Happy", "sad", "sad"]))
    table = pd.concat([table, table[:1].assign(label="sad")])  # a smaller face on the first photograph
    (tmp_path / "people.csv").write_text("id,group\n01,a\n02,b\n03,\n")
    with pytest.warns(UserWarning, match="1 of 7 files are left out"):
        found = accuracy_by_group(table, files, tmp_path / "people.csv", ["Happy", "sad"])
    # a: 01 happy right, 01 sad right; b: 02 happy wrong, 02 sad right; unknown: 03 happy right, 03 sad not found
    assert found[["group", "images", "found", "correct"]].values.tolist() == [
        ["a", 2, 2, 2],
        ["b", 2, 2, 1],
        ["unknown", 2, 1, 1],
    ]
    people = pd.DataFrame(dict(file=["01.jpg", "02.jpg", "03"], label=["sad", "happy", "happy"], group=["a", "b", "c"]))
    found = accuracy_by_group(table, files[:3], people, ["Happy", "sad"])  # labels of the table, not of the folders
    assert list(found["accuracy"]) == [0, 0, 1]
    found = accuracy_by_group(table, files[:3], people.rename(columns={"label": "Label "}), ["Happy", "sad"])
    assert list(found["attribute"]) == ["group"] * 3 and list(found["accuracy"]) == [0, 0, 1]
    found = accuracy_by_group(table, files[:3], people.rename(columns={"file": "Label"}), ["Happy", "sad"])
    assert list(found["accuracy"]) == [0, 0, 1]  # the first column is the file's name, whatever it is called
    with pytest.raises(ValueError, match="several columns of labels: 'label', 'Label'"):
        accuracy_by_group(table, files[:3], people.assign(Label="sad"), ["Happy", "sad"])
    for empty, none in ((people[:0], files[:3]), (people, [])):
        with pytest.raises(ValueError, match="the first is .*none"):
            accuracy_by_group(table, none, empty, ["Happy", "sad"])
    people["label"] = ["sad", None, "happy"]
    with pytest.warns(UserWarning, match="1 of 3 files are left out"):
        found = accuracy_by_group(table, files[:3], people, ["Happy", "sad"])
    assert found[["group", "correct"]].values.tolist() == [["a", 0], ["c", 1]]
    with pytest.raises(ValueError, match="column 'id' .*: the first is 01 in the table, and x.jpg"):
        accuracy_by_group(table, [tmp_path / "x.jpg"], tmp_path / "people.csv", ["happy"])
    with pytest.raises(ValueError, match="id '01' has several rows"):
        accuracy_by_group(table, files, pd.DataFrame(dict(id=["01", "01"], group=["a", "b"])), ["happy"])


def test_ecan_predict_by_group_and_heatmaps(faces, run, tmp_path, capsys):
    images = sorted((faces / "test").glob("*/*.png"))[::5]
    rows = [f"{f.name},{age}" for f, age in zip(images, range(20, 20 + len(images)))]
    (tmp_path / "people.csv").write_text("\n".join(["file,age", *dict.fromkeys(rows)]))
    args = [
        "--run",
        str(run),
        *map(str, images[:8]),
        "--by",
        str(tmp_path / "people.csv"),
        "--heatmaps",
        str(tmp_path / "h.png"),
    ]
    ecan_predict(args)
    said = capsys.readouterr().out
    table = Predictor(run).predict(images[:8])
    right = sum(label == Path(f).parent.name for f, label in zip(table["image"], table["label"]))
    counts = [line.split()[2:4] for line in said.splitlines() if line.split()[:1] == ["age"]]
    assert sum(int(n) for n, _ in counts) == 8 and sum(int(k) for _, k in counts) == right and "found" not in said
    assert min(cv2.imread(str(tmp_path / "h.png")).shape[:2]) > 100


def test_a_wrong_table_of_people_is_refused_before_faces_are_labelled(faces, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Predictor, "predict", lambda *args, **kwargs: pytest.fail("labelled"))
    (tmp_path / "people.csv").write_text("id,age\nnobody,30\n")
    with pytest.raises(SystemExit):
        ecan_predict(["--run", str(run), str(faces / "test"), "--by", str(tmp_path / "people.csv")])
    assert "no file has its name in the column 'id'" in capsys.readouterr().err


def test_a_photograph_without_faces_gets_a_note_and_a_face_none(faces, run, photo, tmp_path, capsys):
    face = min((faces / "test").glob("*/*.png"))
    large = tmp_path / "large.png"
    cv2.imwrite(str(large), np.zeros((400, 385, 3), np.uint8))
    for file, note in ((face, ""), (large, "large.png has 385x400 pixels and was taken as one face")):
        ecan_predict(["--run", str(run), str(file)])
        assert (note in (said := capsys.readouterr().err)) and bool(said) == bool(note)


def test_a_table_has_five_decimals_and_no_more(faces, run, tmp_path):
    ecan_predict(["--run", str(run), str(faces / "test"), "--out", str(tmp_path / "o.csv")])
    numbers = ",".join((tmp_path / "o.csv").read_text().splitlines()[1:]).split(",")
    assert max(len(n.partition(".")[2]) for n in numbers if n.startswith("0.")) == 5


def test_heat_maps_are_drawn_of_the_images_that_can_be_read(faces, run, tmp_path, capsys):
    image = min((faces / "test").glob("*/*.png"))
    (tmp_path / "broken.png").write_text("no image")
    args = ["--run", str(run), str(image), str(tmp_path / "broken.png")]
    with pytest.raises(SystemExit) as e:
        ecan_predict([*args, "--heatmaps", str(tmp_path / "h.png"), "--out", str(tmp_path / "o.csv")])
    said = capsys.readouterr().err
    assert e.value.code == 1 and "broken.png" in said and "1 of 2 files are left out" in said
    assert len(pd.read_csv(tmp_path / "o.csv")) == 1 and cv2.imread(str(tmp_path / "h.png")) is not None


def test_ecan_predict_goes_on_without_a_broken_photograph(photo, run, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.png"), photo[..., ::-1])
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    args = ["--run", str(run), "--faces", "--out", str(tmp_path / "t.csv")]
    with pytest.raises(SystemExit) as end:
        ecan_predict([*args, str(tmp_path / "bad.jpg"), str(tmp_path / "a.png")])
    said = capsys.readouterr().err
    assert end.value.code == 1 and "bad.jpg" in said and "1 of 2 files are left out" in said
    assert set(pd.read_csv(tmp_path / "t.csv")["image"]) == {str(tmp_path / "a.png")}
    with pytest.raises(SystemExit) as end:
        ecan_predict([*args, str(tmp_path / "bad.jpg")])
    assert end.value.code == 2 and "none of the 1 files can be read" in capsys.readouterr().err


def test_a_file_is_not_overwritten_by_its_own_annotation_nor_by_half_of_one(photo, finder, run, tmp_path):
    predictor, file = Predictor(run), video(tmp_path / "v.avi", [photo] * 4)
    Image.fromarray(photo).save(tmp_path / "a.png")
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    for name in before:
        with pytest.raises(ValueError, match=f"{name} is the file that is read, give another name"):
            predictor.predict_faces(tmp_path / name, finder, annotated=tmp_path / name)
    (tmp_path / "out.avi").write_bytes(b"an earlier one")

    class Stopped(FaceFinder):
        def find(self, images):
            if self.min_size == 41:
                raise KeyboardInterrupt
            self.min_size = 41
            return super().find(images)

    with pytest.raises(KeyboardInterrupt):
        predictor.predict_faces(file, Stopped(device="cpu"), annotated=tmp_path / "out.avi", n_frames=2)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {**before, "out.avi": b"an earlier one"}


def test_options_of_a_video_are_refused_without_one(photo, finder, run):
    for option in ("every", "seconds"):
        with pytest.raises(ValueError, match=f"{option} has no effect without a video"):
            Predictor(run).predict_faces(photo, finder, **{option: 2})
    with pytest.raises(ValueError, match="margin: expected more than -1"):
        FaceFinder(margin=-2)
    with pytest.raises(ValueError, match=r"no such device here: nowhere \(.+\)"):
        FaceFinder(device="nowhere")


def test_a_video_that_cannot_be_read_does_not_hold_up_the_rest(tmp_path):
    class Reads:
        def readable(self, photos):
            return range(len(photos))

    (tmp_path / "film.mp4").write_text("no film")
    files = [tmp_path / "a.jpg", tmp_path / "film.mp4", "webcam"]
    with pytest.warns(UserWarning, match="left out: cannot read .*film.mp4: not a video"):
        assert readable_media(Reads(), files) == [0, 2]
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="none of the 1 files"):
        readable_media(Reads(), files[1:2])


def test_a_video_that_breaks_off_costs_no_other_file(photo, finder, run, tmp_path, monkeypatch):
    class Breaks(Played):
        "The third frame cannot be decoded; a video with `empty` in its name has no frame"

        def __init__(self, file):
            super().__init__(file)
            self.empty = "empty" in file

        def grab(self):
            return not self.empty and super().grab()

        def retrieve(self):
            return (False, None) if self.i == 2 else self.video.retrieve()

    for name in ("film.avi", "empty.avi"):
        with VideoWriter(tmp_path / name, 1) as video:
            for i in range(4):
                video.write(i, np.asarray(photo))
    monkeypatch.setattr(cv2, "VideoCapture", Breaks)
    items, predictor = [tmp_path / "film.avi", tmp_path / "empty.avi", np.asarray(photo)], Predictor(run)
    with pytest.raises(ValueError, match="cannot decode the frame at 2.00 s of .*film.avi"):
        predictor.predict_faces(items, finder)
    annotated = tmp_path / "boxes.avi"
    with pytest.raises(ValueError, match="cannot decode the frame at 2.00 s of .*film.avi"):
        predictor.predict_faces(items[0], finder, skip_broken=True, annotated=annotated)
    assert not annotated.exists()
    with pytest.warns(UserWarning, match="left out: cannot ") as caught:
        table = predictor.predict_faces(items, finder, skip_broken=True)
    assert [w.message.args[0].partition(": cannot")[0] for w in caught] == [
        f"the rest of {items[0]} is left out",
        "left out",
    ]
    assert list(table["image"]) == [str(items[0])] * 2 + ["image 2"]
    with pytest.warns(UserWarning, match="empty.avi"):
        assert readable_media(predictor, items) == [0, 2]
    with pytest.warns(UserWarning, match="empty.avi"), pytest.raises(ValueError, match="none of the 1 files can be"):
        predictor.predict_faces(items[1], finder, skip_broken=True)


def test_options_of_videos_are_checked_before_any_image_is_read(run, tmp_path):
    predictor, nothing = Predictor(run), tmp_path / "none.jpg"
    with pytest.raises(ValueError, match="webcam: a camera has no end"):
        predictor.predict_faces([nothing, "webcam"], object())
    with pytest.raises(ValueError, match="every: expected 0 or more seconds"):
        predictor.predict_faces([nothing, tmp_path / "film.avi"], object(), every=-1)


def test_a_lower_threshold_finds_more_faces(photo):
    "The detector itself drops what it gives less than 0.7"
    low, high = (
        [f.score for f in FaceFinder(threshold, min_size=20, device="cpu")(photo)] for threshold in (0.05, 0.7)
    )
    assert len(high) == 1 and len(low) > 1 and 0.05 <= min(low) < 0.7


def test_predict_faces_leaves_out_what_is_broken_if_asked(photo, finder, run, tmp_path):
    (tmp_path / "film.mp4").write_text("no film")
    (tmp_path / "face.jpg").write_text("no photograph")
    items = [tmp_path / "face.jpg", np.asarray(photo), tmp_path / "film.mp4"]
    predictor = Predictor(run)
    with pytest.raises(ValueError, match="cannot decode .*face.jpg"):
        predictor.predict_faces(items, finder)
    with pytest.warns(UserWarning, match="left out: ") as caught:
        table = predictor.predict_faces(items, finder, skip_broken=True)
    assert [("face.jpg" in str(w.message), "film.mp4" in str(w.message)) for w in caught] == [(1, 0), (0, 1)]
    alone = predictor.predict_faces([np.asarray(photo)], finder)
    pd.testing.assert_frame_equal(table, alone.assign(image="image 1"))  # its place in the list
